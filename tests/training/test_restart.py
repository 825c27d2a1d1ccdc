"""A run that goes on reads its checkpoint alone, each device its part of it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.planning.run import Run
from atlas_jax.planning.starting import plan_starting
from atlas_jax.training import trainer
from tests.device_bytes import device_bytes, most_bytes
from tests.training.runs import write_run


def planned_bytes(run: Run) -> dict[str, int]:
    """Most bytes that `plan` expects on a device, by the way to a state."""
    mesh = MeshConfig(data=1, fsdp=4, model=2)
    found = plan_starting(run, mesh, hbm_bytes=1 << 30, devices=jax.devices())
    assert all(one.fits for one in found)
    return {one.program: one.memory.peak for one in found}


def read_bytes() -> int:
    """Bytes that this process has read from files so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.slow
def test_a_run_goes_on_without_the_parameters_that_it_began_with(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    model, mesh = tmp_path / "model", ["MeshConfig.data=1", "MeshConfig.fsdp=4"]
    load_gin([str(gin_file)], [*mesh, "MeshConfig.model=2"])
    with use_devices(from_gin.devices()) as (made_on, rules):
        made = assemble(from_gin.models(), made_on, rules)
        export_model(model, made.models, made.params, made.tokenizers, "float32", {})
    of_folder = [f"ModelConfig.{part}='{model}'" for part in ("reader", "retriever")]
    bindings = [
        *(*mesh, "MeshConfig.model=2", *of_folder),
        *(f"ModelConfig.{part}_tokenizer=''" for part in ("reader", "retriever")),
        f"TrainConfig.model_dir='{tmp_path}/run'",
        "TrainConfig.total_steps=10",
        "TrainConfig.passages='none'",
        "StepConfig.retriever_training='fixed'",
        "EvalConfig.file=''",
        "ReaderConfig.scan_layers=True",
    ]
    load_gin([str(gin_file)], bindings)
    told = from_gin.train_run()
    with use_devices(told.devices) as (made_on, rules):
        planned = planned_bytes(from_gin.plan_run(1))
        run = trainer._prepare(told, made_on, rules)
        state, most = most_bytes(lambda: trainer._begin_or_resume(run))
        assert 0.97 * planned["start"] <= most <= planned["start"]  # a program has tables, too
        both = device_bytes(state) + device_bytes(state.params)  # moments are made beside them
        assert most <= max(both.values()) + 64  # and a key
        trainer._save(run, 7, state)
        run.checkpoints.close()

        for part in ("reader", "retriever"):
            (model / f"{part}.safetensors").unlink()
        again = trainer._prepare(told, made_on, rules)
        before = read_bytes()
        restored, most = most_bytes(lambda: trainer._begin_or_resume(again))
        read = read_bytes() - before
        assert most == planned["restart"] == max(device_bytes(state).values())
        saved = (tmp_path / "run" / "checkpoints").rglob("*")
        assert read <= 1.2 * sum(file.stat().st_size for file in saved if file.is_file())
        jax.tree.map(np.testing.assert_array_equal, state, restored)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        with pytest.raises(UserError, match="lacks reader.safetensors"):
            again.begin()
        again.checkpoints.close()
