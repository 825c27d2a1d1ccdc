"""Folders that hold what was trained of a model alone, on top of another folder."""

import dataclasses
import shutil
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from atlas_jax import from_gin
from atlas_jax.core.deltas import DeltaConfig, split_delta
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.models import assembly
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.models.folder import load_model, open_model
from atlas_jax.training.state import Trains, split_trainable
from tests.models.test_assembly import SIZES

DELTAS = {"reader": DeltaConfig("lora", 2), "retriever": DeltaConfig("adapter", 4)}


def spec(config: ModelConfig, **changes: object) -> ModelSpec:
    return dataclasses.replace(from_gin.models(), config=config, **changes)  # type: ignore[arg-type]


def test_a_delta_holds_its_bytes_alone_and_loads_on_its_base(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin.parse_config(SIZES)
    tokenizers = {
        "reader_tokenizer": str(reader_tokenizer_file),
        "retriever_tokenizer": str(retriever_tokenizer_file),
    }
    base, other, small = (tmp_path / name for name in ("base", "other", "small"))
    with use_devices(from_gin.devices()) as (mesh, rules):

        def export(folder: Path, made: assembly.Assembled, partial: object = None) -> None:
            parts = (made.models, made.params, made.tokenizers)
            assembly.export_model(folder, *parts, "float32", {}, partial=partial)  # type: ignore[arg-type]

        export(base, assembly.assemble(spec(ModelConfig(**tokenizers)), mesh, rules, seed=1))
        export(other, assembly.assemble(spec(ModelConfig(**tokenizers)), mesh, rules, seed=2))
        on_base = ModelConfig(reader=str(base), retriever=str(base))
        made = assembly.assemble(spec(on_base, deltas=DELTAS), mesh, rules, training="joint")
        whole = load_model(base)
        for part in ("reader", "retriever"):
            own, delta = split_delta(jax.device_get(made.params[part]))
            jax.tree.map(np.testing.assert_array_equal, own, whole[part].params)
            assert delta
        moved = jax.tree.map(lambda x: x + 0.5, made.params)
        trains = Trains("joint", ("*/adapter/*", "*/lora/*/kernel"))
        trained, _ = split_trainable(made.params, trains)
        mixed = {
            part: jax.tree.map(lambda x: x, made.params[part]) for part in ("reader", "retriever")
        }
        for part in mixed:  # only what trains has moved
            flat, new = (traverse_util.flatten_dict(t[part]) for t in (mixed, moved))
            paths = set(traverse_util.flatten_dict(trained[part]))
            flat = {path: new[path] if path in paths else leaf for path, leaf in flat.items()}
            mixed[part] = traverse_util.unflatten_dict(flat)
        after = dataclasses.replace(made, params=mixed)
        export(small, after, {part: assembly.Trained(trained[part], str(base)) for part in mixed})
        for part in mixed:
            kept = load_file(small / f"{part}.safetensors")
            names = traverse_util.flatten_dict(split_delta(mixed[part])[1], sep="/")
            assert set(kept) == set(names)
        on_small = ModelConfig(reader=str(small), retriever=str(small))
        gin.parse_config("MeshConfig.fsdp = 8\nMeshConfig.model = 1")
    with use_devices(from_gin.devices()) as (mesh, rules):  # another mesh
        again = assembly.assemble(spec(on_small), mesh, rules)
        assert dict(again.models.deltas) == DELTAS
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), mixed)
        with pytest.raises(UserError, match="train_retriever trains a whole one"):
            assembly.load_retriever(spec(on_small))
        with pytest.raises(UserError, match="leave the bindings out to go on"):
            assembly.assemble(
                spec(on_small, deltas={"reader": DeltaConfig("lora", 3)}), mesh, rules
            )
    _check_bases(small, base, other)


def _check_bases(small: Path, base: Path, other: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"stands on a reader with the fingerprint \w{{12}}; {other} holds \w{{12}}",
    ):
        load_model(small, ("reader",), {"reader": str(other)})
    with pytest.raises(UserError, match="its reader is whole and stands on no base"):
        load_model(base, ("reader",), {"reader": str(other)})
    with pytest.raises(UserError, match="only a plain one will do here"):
        open_model(small)
    shutil.move(base, base.with_name("moved"))
    with pytest.raises(UserError, match="bind ModelConfig.reader_base to the folder"):
        load_model(small, ("reader",))
    load_model(small, ("reader",), {"reader": str(base.with_name("moved"))})
