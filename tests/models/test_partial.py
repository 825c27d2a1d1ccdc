"""A reader without what its retriever has: cut, and joined again."""

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
from atlas_jax.models import partial
from atlas_jax.models.expects import from_json, settled
from atlas_jax.models.folder import ModelPart, load_expects, load_model, save_model
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.training.config import StepConfig
from atlas_jax.training.run import asking_of
from tests.models.test_expects import EXPECTS
from tests.reader.small import PAIR, random_params
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


def test_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    partial.cut(model, tmp_path / "part", {"base": "0" * 64})
    with pytest.raises(UserError, match="fingerprint 000000000000"):
        partial.join(tmp_path / "part", model, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_reader_whose_frozen_part_has_moved_is_not_cut(model: Path, tmp_path: Path) -> None:
    parts = load_model(model)
    table = parts["reader"].params["token_embedder"]["embedding"]
    table += 1
    save_model(model, parts)
    with pytest.raises(UserError, match="token_embedder/embedding of the reader is not"):
        partial.cut(model, tmp_path / "part")


def test_a_damaged_part_is_refused(model: Path, tmp_path: Path) -> None:
    partial.cut(model, tmp_path / "part")
    path = tmp_path / "part" / "part.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sha256": "1" * 64}))
    with pytest.raises(UserError, match="not the file that was saved"):
        partial.join(tmp_path / "part", model, tmp_path / "joined")
    with pytest.raises(UserError, match="no part of a model"):
        partial.join(model, model, tmp_path / "joined")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "1"}, "part.json: format: expected a whole number, got a text"),
        ({"reader": []}, "part.json: reader: expected an object, got a list"),
        ({"about": None}, "part.json: about: expected an object, got null"),
        ({"sha256": 1}, "part.json: sha256: expected a text, got a whole number"),
    ],
)
def test_fields_of_another_type_are_named(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    partial.cut(model, tmp_path / "part")
    path = tmp_path / "part" / "part.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        partial.join(tmp_path / "part", model, tmp_path / "joined")


def test_weights_of_another_part_are_named(model: Path, tmp_path: Path) -> None:
    partial.cut(model, tmp_path / "part")
    content = json.loads((tmp_path / "part" / "part.json").read_text())
    weights = tmp_path / "part" / "reader.safetensors"
    tensors = load_file(weights)
    name = "encoder/layers_2/output/kernel"
    for changed, message in (
        ({**tensors, name: tensors[name][:3]}, rf"{name} is \(3, 8\), but"),
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is absent"),
        ({**tensors, name: tensors[name] * np.nan}, f"{name}: the number at"),
    ):
        save_file(changed, weights)
        content["sha256"] = file_sha256(weights)
        (tmp_path / "part" / "part.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            partial.join(tmp_path / "part", model, tmp_path / "joined")


def test_of_an_older_part_the_retriever_reads_as_in_its_base(model: Path, tmp_path: Path) -> None:
    partial.cut(model, tmp_path / "part")
    file = tmp_path / "part" / "part.json"
    content = json.loads(file.read_text())
    del content["expects"]
    file.write_text(json.dumps({**content, "format": 1}))
    partial.join(tmp_path / "part", model, tmp_path / "joined")
    assert load_expects(tmp_path / "joined") == EXPECTS.half("retriever")
    file.write_text(json.dumps({**content, "format": 2, "expects": {"reader_lenght": 3}}))
    with pytest.raises(UserError, match="part.json: expects: unknown field 'reader_lenght'"):
        partial.join(tmp_path / "part", model, tmp_path / "joined")


def test_the_shipped_part_reads_as_its_run_read() -> None:
    said = from_json(json.loads((mini.PART / "part.json").read_text())["expects"], "part")
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
