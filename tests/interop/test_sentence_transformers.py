"""What a sentence-transformers folder says of its texts: taken over, or told, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_jax.conversion.convert import convert
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.from_gin import task, told
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.folder import load_model, load_tokenizer
from atlas_jax.tasks.base import Record
from tests.interop import small
from tests.interop.test_huggingface import POOLER

WHOLE = "config_sentence_transformers.json"
TEXTS = "sentence_bert_config.json"
PROMPTS = {"query": "query: ", "document": "passage {1}: "}


def folder(tmp_path: Path, normalize: bool = True, **files: Any) -> Path:
    """The small MiniLM with files beside it; `sentence_bert_config` for `...config.json`."""
    made = tmp_path / "given"
    shutil.copytree(small.GOLDENS / "minilm", made)
    if not normalize:
        modules = json.loads((made / "modules.json").read_text())
        (made / "modules.json").write_text(json.dumps(modules[:2]))
    for name, content in files.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    return made


def converted(tmp_path: Path, given: Path, cased: bool = False) -> tuple[Path, list[str]]:
    """The model folder, and what was printed."""
    vocabulary = small.wordpiece_file(tmp_path)
    if cased:
        capitals = [chr(c) for c in range(ord("A"), ord("Z") + 1)]
        vocabulary.write_text("\n".join([vocabulary.read_text().strip(), *capitals[:20]]) + "\n")
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    output, lines = tmp_path / "out", list[str]()
    tokenizers = {"retriever": str(vocabulary)}
    job = small.job("hf", "atlas-jax", given, output, allow_unused=POOLER, tokenizers=tokenizers)
    convert(job, lines.append)
    return output, lines


def refusal(tmp_path: Path, given: Path) -> str:
    with pytest.raises(UserError) as caught:
        converted(tmp_path, given)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def remarks(output: Path) -> list[str]:
    (part,) = json.loads((output / "certificate.json").read_text())["parts"]
    return list(part["remarks"])


def asked(name: str, **fields: Any) -> str:
    """What the retriever reads of a record of a task, as gin has it."""
    return str(task(name).example(Record("1", "x:1", fields, (), None, {})).retriever_text)


def test_prompts_become_formats(tmp_path: Path) -> None:
    given = folder(
        tmp_path,
        config_sentence_transformers={"prompts": PROMPTS, "default_prompt_name": "query"},
    )
    output, lines = converted(tmp_path, given)
    told_of = "prompts: query 'query: ', passage 'passage {1}: '; options.gin binds them"
    assert remarks(output) == [told_of] and f"  {told_of}" in lines
    load_gin([str(output / "options.gin")])
    assert asked("qa", question="who?", answers=["a"]) == "query: who?"
    assert asked("fever", claim="it is", label="SUPPORTS") == "query: it is"
    passage = {"id": "1", "title": "A", "section": "", "text": "b"}
    assert told(StoreConfig).text("retriever", passage) == "passage {1}: A b"


@pytest.mark.parametrize(
    ("whole", "query", "passage"),
    [
        ({"prompts": {"a": "A "}, "default_prompt_name": "a"}, "A ", "A "),
        ({"prompts": {"query": "Q "}}, "Q ", ""),
        ({"prompts": {"passage": "P ", "corpus": "C "}}, "", "P "),
        ({"prompts": {"query": "", "document": ""}, "default_prompt_name": None}, "", ""),
    ],
)
def test_which_prompt_is_whose(
    tmp_path: Path, whole: dict[str, Any], query: str, passage: str
) -> None:
    output, _ = converted(tmp_path, folder(tmp_path, config_sentence_transformers=whole))
    assert (output / "options.gin").exists() == bool(query or passage)
    if query or passage:
        load_gin([str(output / "options.gin")])
        assert asked("qa", question="who?", answers=["a"]) == f"{query}who?"
        assert told(StoreConfig).retriever_format == f"{passage}{{title}} {{text}}"


def test_a_cosine_normalises(tmp_path: Path) -> None:
    given = folder(
        tmp_path, normalize=False, config_sentence_transformers={"similarity_fn_name": "cosine"}
    )
    output, _ = converted(tmp_path, given)
    assert load_model(output)["retriever"].config["normalize"] is True
    assert remarks(output) == ["similarity_fn_name is cosine: RetrieverConfig.normalize is True"]
    part = small.parts_of(output)["retriever"]
    ours = small.embeddings(part, small.outputs()["ids"])
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("name", "normalize"), [("dot", False), (None, False)])
def test_an_inner_product_does_not(tmp_path: Path, name: str | None, normalize: bool) -> None:
    given = folder(
        tmp_path, normalize=False, config_sentence_transformers={"similarity_fn_name": name}
    )
    output, _ = converted(tmp_path, given)
    assert load_model(output)["retriever"].config["normalize"] is normalize
    assert remarks(output) == []


def test_what_is_not_taken_over_is_told(tmp_path: Path) -> None:
    whole = {"similarity_fn_name": "euclidean", "prompts": {"clustering": "c: "}}
    output, _ = converted(tmp_path, folder(tmp_path, config_sentence_transformers=whole))
    assert remarks(output) == [
        "prompts that nothing here uses: clustering",
        "similarity_fn_name is euclidean, not taken over: passages are ranked by the inner product",
    ]


def test_the_length_is_bound(tmp_path: Path) -> None:
    given = folder(tmp_path, sentence_bert_config={"max_seq_length": 12})  # of 19 positions
    output, _ = converted(tmp_path, given)
    assert remarks(output) == ["max_seq_length: 12 tokens of a text; options.gin binds it"]
    assert (output / "options.gin").read_text().splitlines()[2:] == [
        "StoreConfig.retriever_length = 12",
        "DataConfig.retriever_query_length = 12",
    ]


def test_letters_are_made_small_where_the_folder_does(tmp_path: Path) -> None:
    given = folder(tmp_path, sentence_bert_config={"do_lower_case": True})
    output, _ = converted(tmp_path, given, cased=True)
    assert remarks(output) == ["do_lower_case is true: the tokenizer makes letters small"]
    found = load_tokenizer(output, "retriever")
    assert found.lowercases
    assert found.encode("ABc", True) == found.encode("abc", True)
    assert found.unk_id not in found.encode("ABc", True)


def test_a_tokenizer_that_makes_them_small_anyway_is_left_alone(tmp_path: Path) -> None:
    given = folder(tmp_path, sentence_bert_config={"do_lower_case": True})
    output, _ = converted(tmp_path, given)
    assert remarks(output) == [
        "do_lower_case is true: the tokenizer makes letters small, as it did before"
    ]
    text = (output / "retriever_tokenizer.json").read_text()
    assert json.loads(text)["normalizer"]["type"] == "BertNormalizer"
    plain = Tokenizer.from_file(output / "retriever_tokenizer.json")
    assert plain.encode("Ab", False) == plain.encode("ab", False)


def old(tmp_path: Path, kind: str, path: str) -> Path:
    """A folder whose transformer lies in one of its own, with a cls pooling."""
    given = folder(tmp_path, sentence_bert_config={"max_seq_length": 12})
    inner = given / path
    inner.mkdir()
    for name in ("config.json", "model.safetensors", TEXTS):
        (given / name).rename(inner / name)
    modules = json.loads((given / "modules.json").read_text())
    modules[0] |= {"path": path, "type": f"sentence_transformers.models.{kind}"}
    (given / "modules.json").write_text(json.dumps(modules))
    (given / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return given


@pytest.mark.parametrize(
    ("kind", "path"), [("Transformer", "0_Transformer"), ("BERT", "0_BERT"), ("Transformer", "t/")]
)
def test_old_folders_are_followed(tmp_path: Path, kind: str, path: str) -> None:
    given = old(tmp_path, kind, path)
    output, _ = converted(tmp_path, given)
    config = load_model(output)["retriever"].config
    assert config["pooling"] == "cls" and config["normalize"] is True
    assert "max_seq_length: 12" in remarks(output)[0]


def test_the_transformer_of_an_old_folder_alone_is_refused(tmp_path: Path) -> None:
    given = old(tmp_path, "Transformer", "0_Transformer")
    message = refusal(tmp_path, given / "0_Transformer")
    assert f"is one module of the sentence-transformers folder {given}" in message
    assert f"convert {given} instead" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": {"0": {}}}, "modules.json: expected a list, got an object"),
        ({"modules": [{"type": ["x"]}]}, "modules.json: [0].type: expected a text, got a list"),
        ({"modules": [{"type": "a.Transformer", "path": "../.."}]}, "lies outside of the folder"),
        ({"config_sentence_transformers": {"prompts": ["q"]}}, "prompts: expected an object"),
        ({"config_sentence_transformers": {"prompts": {"query": 1}}}, "prompts"),
        ({"config_sentence_transformers": {"default_prompt_name": "x"}}, "no prompt is called so"),
        ({"sentence_bert_config": {"max_seq_length": "16"}}, "max_seq_length: expected"),
        ({"sentence_bert_config": {"do_lower_case": 1}}, "do_lower_case: expected true or false"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, folder(tmp_path, **files))


def test_prompts_that_the_pooling_leaves_out_are_refused(tmp_path: Path) -> None:
    given = folder(tmp_path, config_sentence_transformers={"prompts": PROMPTS})
    small.edit_json(given / "1_Pooling" / "config.json", include_prompt=False)
    assert "include_prompt is false" in refusal(tmp_path, given)
