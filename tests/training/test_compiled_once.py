"""A step is compiled once, in whole runs too; where it is not, a warning says what changed."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core import memory
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.trainer import train
from tests.training.runs import write_run
from tests.training.test_resume import FULL, ROLLING

WARNED = "was compiled again"


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.ones((4, 5), np.float32), "batch/x is float32[4, 5] on the host, was float32[4, 3]"),
        (np.ones((4, 3), np.int32), "batch/x is int32[4, 3] on the host, was float32[4, 3]"),
    ],
)
def test_a_second_program_is_told_with_what_changed(
    batch: np.ndarray, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    step = CompiledOnce(
        jax.jit(lambda w, batch: w + batch["x"].sum().astype(w.dtype)), "w", "batch", smaller="x"
    )
    w = jnp.zeros(2)
    for number in (1, 2):
        w = step(number, w, {"x": np.ones((4, 3), np.float32)})
    assert not caplog.records
    w = step(3, w, {"x": batch})
    step(4, w, {"x": batch})
    (told,) = caplog.messages
    assert told.startswith(f"step 3 {WARNED}: {said}")


def test_a_source_on_other_devices_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = CompiledOnce(
        jax.jit(lambda w, source: w + source.sum(), donate_argnums=0), "w", "source", smaller="x"
    )
    w = jnp.zeros(())
    for number, spec in enumerate((("data",), ("data",), ()), start=1):
        where = jax.NamedSharding(mesh, jax.P(*spec))
        w = step(number, w, jax.device_put(jnp.ones(16), where))
    (told,) = [line for line in caplog.messages if "source" in line]
    assert "source is float32[16] on P(), was float32[16] on P('data',)" in told


def test_a_step_that_no_memory_holds_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = 8 * 4 * 1000 * 1000  # bytes: a sorted array cannot be fused away, on eight devices
    step = CompiledOnce(
        jax.jit(lambda w: (w[:, None] * w[None]).sort(1).sum()), "w", smaller="batch"
    )
    monkeypatch.setattr(memory, "free", lambda: kept - 1)
    with pytest.raises(UserError, match=r"a training step needs .* GB, .* bind a smaller batch"):
        step(1, jnp.ones(1000))
    monkeypatch.setattr(memory, "free", lambda: 4 * kept)
    assert step(1, jnp.ones(1000)) == 1e6


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [FULL, ROLLING], ids=["full", "rolling"])
def test_refreshes_and_a_resumption_compile_nothing_again(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    fresh: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On eight devices: the index is replaced, or changed in slices, and steps repeated."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    programs = []
    call = CompiledOnce.__call__

    def counted(self: CompiledOnce, *args: Any) -> Any:
        result = call(self, *args)
        programs.append(self._function._cache_size())
        return result

    monkeypatch.setattr(CompiledOnce, "__call__", counted)
    for steps in (6, 11):  # the second run goes on from the first one's checkpoint
        bindings = {
            "TrainConfig.model_dir": f"'{tmp_path / 'run'}'",
            "TrainConfig.total_steps": steps,
            "CheckpointConfig.every": 4,
            "StepConfig.retriever_training": "'joint'",
            "MeshConfig.data": 2,
            "MeshConfig.fsdp": 2,
            "MeshConfig.model": 2,
            **fresh,
        }
        load_gin([str(gin_file)], [f"{name}={value}" for name, value in bindings.items()])
        with caplog.at_level(logging.WARNING):
            state = train(from_gin.train_run())
        assert int(state.step) == steps
    assert programs == [1] * 11
    assert not [line for line in caplog.messages if WARNED in line]
