"""Model folders: what is saved comes back, is verified, and is never half-written."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.models.folder import ModelPart, load_model, save_model
from atlas_jax.models.matching import check_params


@pytest.fixture
def parts(reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> dict[str, ModelPart]:
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "reader": ModelPart(
            {"emb_dim": 4},
            {"encoder": {"layers_0": {"kernel": make(4, 6)}}, "embedding": make(8, 4)},
            Tokenizer.from_file(reader_tokenizer_file),
        ),
        "retriever": ModelPart(
            {"hidden_dim": 2}, {"w": make(2)}, Tokenizer.from_file(retriever_tokenizer_file)
        ),
    }


def test_a_model_folder_comes_back(tmp_path: Path, parts: dict[str, ModelPart]) -> None:
    save_model(tmp_path / "model", parts, about={"steps": 3})
    found = load_model(tmp_path / "model")
    for name, part in parts.items():
        jax.tree.map(np.testing.assert_array_equal, found[name].params, part.params)
        assert found[name].config == part.config
        assert found[name].tokenizer.content_hash == part.tokenizer.content_hash
    assert list(load_model(tmp_path / "model", ("retriever",))) == ["retriever"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
    (tmp_path / "other").touch()
    usual = (tmp_path / "other").stat().st_mode  # others may read a model as any file
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {usual}


def test_a_bfloat16_folder_is_half_the_size_and_rounded(
    tmp_path: Path, parts: dict[str, ModelPart]
) -> None:
    save_model(tmp_path / "model", parts, dtype="bfloat16")
    found = load_model(tmp_path / "model")["reader"].params["embedding"]
    assert found.dtype == np.float32
    expected = np.asarray(parts["reader"].params["embedding"])
    np.testing.assert_array_equal(found, np.asarray(jnp.bfloat16(expected), np.float32))


def test_saving_again_replaces_the_folder_and_a_failure_does_not(
    tmp_path: Path, parts: dict[str, ModelPart], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_model(folder, parts)
    save_model(folder, {"reader": parts["reader"]}, about={"second": True})
    before = (folder / "config.json").read_text()
    assert json.loads(before)["about"] == {"second": True}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("atlas_jax.models.folder.save_file", full)
    with pytest.raises(
        UserError, match="could not be written, nothing of it was kept: .*No space left"
    ):
        save_model(folder, parts)
    assert (folder / "config.json").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


def test_a_damaged_model_folder_is_refused(tmp_path: Path, parts: dict[str, ModelPart]) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="not a model folder: it has no config.json"):
        load_model(folder)
    save_model(folder, {"reader": parts["reader"]})
    with pytest.raises(UserError, match="has no retriever; it has reader"):
        load_model(folder, ("retriever",))
    weights = folder / "reader.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="reader.safetensors is not the file that was saved"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match="lacks reader.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cut off"):
        load_model(folder)


def test_params_that_do_not_fit_are_named(parts: dict[str, ModelPart]) -> None:
    params = parts["reader"].params
    check_params(params, params, "there")
    wider = {**params, "embedding": np.zeros((9, 4), np.float32)}
    with pytest.raises(
        UserError,
        match=r"there is a checkpoint of another model: parameter embedding is float32\[8,4\]",
    ):
        check_params(params, wider, "there")
