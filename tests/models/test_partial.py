"""A reader without what its retriever has: cut, and joined again or read as it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from atlas_jax import from_gin, mini
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import file_sha256
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.expects import settled
from atlas_jax.models.folder import (
    ModelPart,
    load_expects,
    load_model,
    load_tokenizer,
    save_model,
)
from atlas_jax.models.partial import given
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.training.config import StepConfig
from atlas_jax.training.run import asking_of
from tests.models.test_expects import EXPECTS
from tests.reader.small import PAIR, config, random_params
from tests.reader.test_from_tower import bert_tokenizer, random_tower

READER = PAIR
RETRIEVER = RetrieverConfig(
    vocab_size=120, hidden_dim=8, num_layers=3, num_heads=2, mlp_dim=16, max_positions=16
)


def fields(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder whose reader has gone on from the retriever's tower."""
    tokenizer, tower = bert_tokenizer(), random_tower(READER)
    reader = start_from_tower(random_params(T5(READER)), tower, READER, tokenizer.eos_id)
    trained = traverse_util.flatten_dict(reader, sep="/")
    trained["encoder/layers_2/output/kernel"] = trained["encoder/layers_2/output/kernel"] + 1
    parts = {
        "reader": ModelPart(
            fields(READER), traverse_util.unflatten_dict(trained, sep="/"),
            reader_tokenizer(tokenizer),
        ),
        "retriever": ModelPart(fields(RETRIEVER), {"encoder": tower}, tokenizer),
    }  # fmt: skip
    save_model(tmp_path / "model", parts, expects=EXPECTS)
    return tmp_path / "model"


def test_a_part_joined_to_its_base_is_the_model_again(model: Path, tmp_path: Path) -> None:
    assert mini.main([f"--cut={model}", f"--output={tmp_path / 'part'}"]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "part").iterdir())
    assert size < (model / "reader.safetensors").stat().st_size * 0.6
    output = tmp_path / "joined"
    args = [f"--part={tmp_path / 'part'}", f"--base={model}", f"--output={output}"]
    assert mini.main(args) == 0
    ours, theirs = load_model(output), load_model(model)
    assert ours["reader"].config == theirs["reader"].config
    assert ours["reader"].tokenizer.content_hash == theirs["reader"].tokenizer.content_hash
    towers = (one["retriever"].params for one in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, *towers)
    assert load_expects(output) == EXPECTS
    found, expected = (
        traverse_util.flatten_dict(one["reader"].params, sep="/") for one in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        frozen = name.startswith(("token_embedder", "encoder/embeddings", "encoder/layers_0",
                                  "encoder/layers_1"))  # fmt: skip
        rounded = leaf if frozen else leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)

    # The part serves as it is, too, and brings no tokenizer of its own.
    part = load_model(tmp_path / "part", ("reader",), {"reader": str(model)})["reader"]
    jax.tree.map(np.testing.assert_array_equal, part.params, ours["reader"].params)
    assert part.tokenizer.content_hash == theirs["reader"].tokenizer.content_hash
    found = load_tokenizer(tmp_path / "part", "reader", str(model))
    assert found.content_hash == part.tokenizer.content_hash
    assert {file.name for file in (tmp_path / "part").iterdir()} == {
        "config.json", "reader.safetensors",
    }  # fmt: skip


def test_a_part_pretrained_on_sentences_takes_questions_of_the_same_length(
    model: Path, tmp_path: Path
) -> None:
    asked = dataclasses.replace(EXPECTS.tasks["qa"], query_length=9, wording={"query_format": "x"})
    for tasks, length in (({"sentences": asked}, 9), ({**EXPECTS.tasks, "sentences": asked}, 8)):
        save_model(model, load_model(model), expects=dataclasses.replace(EXPECTS, tasks=tasks))
        mini.cut(model, tmp_path / "part")
        found = load_expects(tmp_path / "part").tasks
        assert found["sentences"] == asked
        assert found["qa"].query_length == length and "x" not in found["qa"].wording.values()


def test_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    mini.cut(model, tmp_path / "part")
    parts = load_model(model)
    parts["retriever"].params["encoder"]["layers_0"]["output"]["kernel"] += 1
    save_model(tmp_path / "other", parts)
    with pytest.raises(
        UserError, match=r"stands on a retriever with the fingerprint \w{12}; .*other holds \w{12}"
    ):
        mini.join(tmp_path / "part", tmp_path / "other", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(UserError, match="nobody said where that is; bind ModelConfig.reader_base"):
        load_model(tmp_path / "part")


def test_a_reader_whose_frozen_part_has_moved_is_not_cut(model: Path, tmp_path: Path) -> None:
    parts = load_model(model)
    table = parts["reader"].params["token_embedder"]["embedding"]
    table += 1
    save_model(model, parts)
    with pytest.raises(UserError, match="token_embedder/embedding of the reader is not"):
        mini.cut(model, tmp_path / "part")


def test_weights_of_another_part_are_named(model: Path, tmp_path: Path) -> None:
    mini.cut(model, tmp_path / "part")
    config_file, weights = (tmp_path / "part" / n for n in ("config.json", "reader.safetensors"))
    content, tensors = json.loads(config_file.read_text()), load_file(weights)
    name = "encoder/layers_2/output/kernel"
    for changed, message in (
        ({**tensors, name: tensors[name][:3]}, rf"{name} is float32\[3,8\] there and"),
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is absent there"),
        ({**tensors, name: tensors[name] * np.nan}, f"{name}: the number at"),
    ):
        save_file(changed, weights)
        content["sha256"]["reader.safetensors"] = file_sha256(weights)
        config_file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            mini.join(tmp_path / "part", model, tmp_path / "joined")


def test_a_t5_stands_on_no_retriever() -> None:
    with pytest.raises(UserError, match="only a reader with a pair encoder has parts of one"):
        given("reader", fields(config()), "retriever", {"encoder": {}}, 1)


def test_the_shipped_part_says_what_it_stands_on() -> None:
    with pytest.raises(UserError, match=r"on top of a retriever \(5fbcbb6eda51\)"):
        load_model(mini.PART)


def test_of_a_part_that_does_not_say_it_the_retriever_reads_as_in_its_base(
    model: Path, tmp_path: Path
) -> None:
    mini.cut(model, tmp_path / "part")
    file = tmp_path / "part" / "config.json"
    content = json.loads(file.read_text())
    del content["expects"]
    file.write_text(json.dumps({**content, "format": 1}))
    mini.join(tmp_path / "part", model, tmp_path / "joined")
    assert load_expects(tmp_path / "joined") == EXPECTS.half("retriever")
    file.write_text(json.dumps({**content, "format": 2, "expects": {"reader_lenght": 3}}))
    with pytest.raises(UserError, match="config.json: expects: unknown field 'reader_lenght'"):
        mini.join(tmp_path / "part", model, tmp_path / "joined")


def test_the_shipped_part_reads_as_its_run_read() -> None:
    said = load_expects(mini.PART)
    load_gin(
        ["runs/mini_pretrain.gin"],
        ["MODEL_DIR=x", "PASSAGES=x", "STORE=x", "RETRIEVER_CHECKPOINT_PATH=x"],
    )
    read = from_gin.told(StoreConfig), from_gin.told(StepConfig).reader_length
    assert (settled(StoreConfig, said.store, {}), said.text_length) == read
    data, task = from_gin.told(DataConfig), from_gin.task("sentences")
    assert said.tasks == {
        "qa": dataclasses.replace(asking_of(task, data), wording={}),
        "sentences": asking_of(task, data),
    }
