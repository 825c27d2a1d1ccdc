"""Encoders with heads as model folders: there and back, further heads, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.interop.vocabularies import find_tokenizer
from atlas_jax.models.encoder_folder import Encoder, load_encoder, save_encoder, with_heads
from atlas_jax.models.folder import ModelPart, save_model
from atlas_jax.retriever.config import RetrieverConfig
from tests.interop.small import wordpiece_file

SIZES: dict[str, Any] = {
    "vocab_size": 57, "hidden_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16,
    "max_positions": 12,
}  # fmt: skip
TOKENS = np.array([[2, 9, 4, 11, 3], [2, 8, 3, 0, 0]], np.int32)


def fresh(folder: Path, heads: tuple[str, ...] = ("mlm",), **fields: Any) -> Encoder:
    tokenizer = Tokenizer(find_tokenizer(wordpiece_file(folder), "encoder") or "")
    return with_heads(Encoder(EncoderModelConfig(**SIZES, **fields), {}, tokenizer), heads)


def test_an_encoder_comes_back_and_its_pieces_give_what_the_whole_gives(tmp_path: Path) -> None:
    saved = fresh(tmp_path, ("mlm", "sentence", "discriminator"), encoder="albert",
                  encoder_options={"factor_dim": 4})  # fmt: skip
    save_encoder(tmp_path / "folder", saved)
    found = load_encoder(tmp_path / "folder", ("mlm", "sentence"), dropout_rate=0.25)
    assert found.config == dataclasses.replace(saved.config, dropout_rate=0.25)
    jax.tree.map(np.testing.assert_array_equal, found.params, saved.params)
    assert found.tokenizer.content_hash == saved.tokenizer.content_hash
    assert (found.tokenizer.mask_id, found.tokenizer.special_ids) == (4, (0, 1, 2, 3, 4))
    variables = {"params": found.params}
    states, logits = found.model.apply(variables, TOKENS)
    assert {name: x.shape for name, x in logits.items()} == {
        "mlm": (2, 5, 57), "sentence": (2, 2), "discriminator": (2, 5)
    }  # fmt: skip
    for name, method in (("mlm", "token_logits"), ("sentence", "sentence_logits"),
                         ("discriminator", "replaced_logits")):  # fmt: skip
        again = found.model.apply(variables, states, method=method)
        np.testing.assert_array_equal(again, logits[name])
    rows = found.model.apply(variables, TOKENS, method="embed_tokens")
    same = found.model.apply(variables, TOKENS, True, embedded_ble=rows, method="states")
    np.testing.assert_array_equal(same, states)


def test_further_heads_leave_what_is_there(tmp_path: Path) -> None:
    first = fresh(tmp_path)
    more = with_heads(first, ("sentence",), seed=5, num_classes=3)
    assert more.config.heads == ("mlm", "sentence")
    assert more.params["sentence"]["classifier"]["bias"].shape == (3,)
    for name in ("encoder", "mlm"):
        jax.tree.map(np.testing.assert_array_equal, more.params[name], first.params[name])
    other = with_heads(more, (), num_classes=4)
    assert other.params["sentence"]["classifier"]["bias"].shape == (4,)


def test_a_retriever_is_an_encoder_without_heads(tmp_path: Path) -> None:
    first = fresh(tmp_path, ())
    config = RetrieverConfig(**SIZES, pooling="cls")
    part = ModelPart(dataclasses.asdict(config), first.params, first.tokenizer)
    save_model(tmp_path / "retriever", {"retriever": part})
    found = load_encoder(tmp_path / "retriever")
    assert found.config == first.config
    jax.tree.map(np.testing.assert_array_equal, found.params, first.params)
    tower = first.params["encoder"]
    two = dataclasses.replace(
        part,
        config=dataclasses.asdict(dataclasses.replace(config, tied=False)),
        params={"query_encoder": tower, "passage_encoder": tower},
    )
    save_model(tmp_path / "two", {"retriever": two})
    with pytest.raises(UserError, match="its retriever has two towers"):
        load_encoder(tmp_path / "two")


def test_an_absent_head_or_a_field_of_another_model_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "folder", fresh(tmp_path))
    with pytest.raises(UserError, match="its encoder has no sentence head; it has mlm"):
        load_encoder(tmp_path / "folder", ("sentence",))
    with pytest.raises(UserError, match="is a checkpoint of another model: parameter encoder/"):
        load_encoder(tmp_path / "folder", mlp_dim=8)
