"""Hugging Face's ALBERT, RoBERTa, ELECTRA and BERT, with and without heads, in and out again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from atlas_jax.conversion.convert import convert, read_model_folder
from atlas_jax.core import tokenizer as core
from atlas_jax.core.errors import UserError
from atlas_jax.interop.encoders import encoder_fields, encoder_json
from atlas_jax.interop.vocabularies import checked, exchanged_ids
from tests.encoders.test_hf_parity import CASES, HEADS_OF, their_model
from tests.interop.small import job, quiet, wordpiece_file

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "<mask>"]


def roberta_tokenizer(folder: Path) -> str:
    """A vocabulary in RoBERTa's order, `<s>` first."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path.read_text("utf-8")


def test_padding_of_a_roberta_becomes_id_0(tmp_path: Path) -> None:
    text = roberta_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the padding token has id 1"):
        core.Tokenizer(text)
    ours = core.Tokenizer(checked(text, "retriever", "here"))
    assert (ours.pad_id, ours.cls_id, ours.eos_id) == (0, 1, 2)
    theirs = Tokenizer.from_str(text).encode("abc").ids
    assert theirs[0] == 0
    assert ours.encode("abc", add_special=True) == [1, *theirs[1:]]
    assert ours.pad_to([ours.encode("abcdef", True)], 5).tolist() == [[1, 4, 5, 6, 2]]
    assert json.loads(exchanged_ids(exchanged_ids(text))) == json.loads(text)


@pytest.mark.parity
@pytest.mark.parametrize("case", [name for name in CASES if name != "bert tanh"])
def test_a_model_with_its_heads_comes_in_and_goes_out(case: str, tmp_path: Path) -> None:
    encoder, options, kind, settings = CASES[case]
    theirs = their_model(kind, settings)
    theirs.save_pretrained(tmp_path / "hf")
    if encoder == "roberta":
        roberta_tokenizer(tmp_path / "hf")
    else:
        wordpiece_file(tmp_path / "hf")
    inside, outside = tmp_path / "ours", tmp_path / "again"
    come = job("hf", "atlas-jax", tmp_path / "hf", inside, part="encoder", verify=True)
    certificate = convert(come, quiet)[0]
    assert max(certificate.layers.values()) < 1e-4
    assert set(HEADS_OF[kind]) < set(certificate.layers)
    part = read_model_folder(inside)["encoder"]
    assert tuple(part.config["heads"]) == tuple(h for h in ("mlm", "sentence", "discriminator")
                                                if h in HEADS_OF[kind])  # fmt: skip
    assert part.config["encoder"] == encoder
    assert {k: v for k, v in options.items() if k != "activation"} == part.config["encoder_options"]
    convert(job("atlas-jax", "hf", inside, outside, verify=True), quiet)
    again = type(theirs).from_pretrained(outside)
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), value.numpy(), name)


@pytest.mark.parity
@pytest.mark.parametrize(("encoder", "name"), [("albert", "Albert"), ("roberta", "Roberta"),
                                               ("electra", "Electra")])  # fmt: skip
def test_a_retriever_without_heads(encoder: str, name: str, tmp_path: Path) -> None:
    options = {"type_vocab_size": 2} if encoder == "roberta" else {"embedding_size": 10}
    their_model(f"{name}Model", options).save_pretrained(tmp_path / "hf")
    if encoder == "roberta":
        roberta_tokenizer(tmp_path / "hf")
    else:
        wordpiece_file(tmp_path / "hf")
    unused = ("pooler*",)
    come = job("hf", "atlas-jax", tmp_path / "hf", tmp_path / "ours", verify=True,
               allow_unused=unused)  # fmt: skip
    certificate = convert(come, quiet)[0]
    assert certificate.kind == "retriever"
    assert max(certificate.layers.values()) < 1e-4
    assert "embedding" in certificate.layers
    back = job("atlas-jax", "hf", tmp_path / "ours", tmp_path / "again", verify=True)
    assert max(convert(back, quiet)[0].layers.values()) < 1e-4


SAID: dict[str, Any] = {
    "model_type": "albert", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; an encoder has 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"vocab_size": None}, "vocab_size: expected a whole number"),
        ({"model_type": "roberta", "pad_token_id": 3}, "pad_token_id is 3; a RoBERTa's is 1"),
    ],
)
def test_what_no_encoder_has_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_fields({**SAID, **settings}, Path("config.json"))


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({"sharing": "ffn"}, (), "this ALBERT shares 'ffn'; Hugging Face's shares 'all' alone"),
        ({}, ("discriminator",), "no albert with the heads discriminator and nothing else"),
    ],
)
def test_what_hugging_face_has_not_is_refused(
    options: dict[str, Any], heads: tuple[str, ...], message: str
) -> None:
    fields = {**encoder_fields(SAID, Path("config.json")), "encoder_options": options}
    with pytest.raises(UserError, match=message):
        encoder_json(fields, heads)
