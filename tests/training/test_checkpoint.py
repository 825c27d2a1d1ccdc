"""Checkpoints: what is saved comes back, and nothing is half-written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import CheckpointConfig


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: dict
    key: jax.Array


def make_state(step: int, width: int = 3) -> State:
    params = {"reader": {"wi": jnp.arange(4.0 * width).reshape(4, width) + step}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    key = jax.random.key_data(jax.random.key(step))
    return State(jnp.int32(step), params, {"reader": tx.init(params)}, key)


def assert_same(a: State, b: State) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_checkpoint_comes_back_with_its_notes(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "run", CheckpointConfig(keep=2))
    assert saver.restore(make_state(0)) is None
    notes = {"data": {"next": 7}, "index_version": 3}
    saver.save(5, make_state(5), notes)
    saver.close()

    found = Checkpointer(tmp_path / "run", CheckpointConfig()).restore(make_state(0))
    assert found is not None
    assert (found.step, found.notes) == (5, notes)
    assert_same(found.state, make_state(5))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        saver.save(step, make_state(step), {"index_version": step})
    assert saver.steps() == [2, 3]
    assert [saver.read_notes(step)["index_version"] for step in saver.steps()] == [2, 3]


def test_an_old_checkpoint_is_renamed_before_it_is_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill on the way would leave half of one, which counts by its name."""
    removed: list[str] = []

    def noting(remove: Callable[..., None]) -> Callable[..., None]:
        def note(path: Any, *args: Any, **named: Any) -> None:
            removed.append(str(path))
            remove(path, *args, **named)

        return note

    monkeypatch.setattr(os, "unlink", noting(os.unlink))
    monkeypatch.setattr(shutil, "rmtree", noting(shutil.rmtree))
    saver = Checkpointer(tmp_path, CheckpointConfig(keep=1))
    for step in (1, 2, 3):
        saver.save(step, make_state(step), {})
    saver.wait()
    assert any(str(tmp_path) in path for path in removed)
    for step in (1, 2):
        assert not [path for path in removed if path.startswith(str(tmp_path / str(step)))]
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_a_kill_left_of_an_old_checkpoint_is_cleared_away(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2):
        saver.save(step, make_state(step), {})
    saver.close()
    (tmp_path / "deleted").mkdir()
    (tmp_path / "1").rename(tmp_path / "deleted" / "1")
    shutil.rmtree(tmp_path / "deleted" / "1" / "notes")

    again = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    assert again.steps() == [2]
    assert again.restore(make_state(0)) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, CheckpointConfig())
    saver.save(1, make_state(1), {})
    with pytest.raises(UserError, match=r"params/reader/wi is float32\[4,3\].*float32\[4,5\]"):
        saver.restore(make_state(0, width=5))
    other_optimizer = make_state(0).replace(opt_state={"reader": optax.sgd(1.0).init({})})
    with pytest.raises(UserError, match=r"opt_state/reader\S+ is \S+ there and absent here"):
        saver.restore(other_optimizer)


SAVER = """
import os, resource, signal, sys
import jax, jax.numpy as jnp
from atlas_jax.core.errors import UserError
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import CheckpointConfig

directory, how = sys.argv[1:]
saver = Checkpointer(directory, CheckpointConfig(keep=3))
state = lambda step: {"params": jax.random.normal(jax.random.key(step), (400, 1000))}
saver.save(1, state(1), {})
saver.wait()
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writes beyond it fail
    try:
        saver.save(2, state(2), {})
        saver.wait()
    except UserError as error:
        print(error)
    sys.exit()
print("ready", flush=True)
for step in range(2, 10_000):
    saver.save(step, state(step), {})
"""


def _saver(directory: Path, how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-c", SAVER, str(directory), how],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _newest(directory: Path) -> tuple[int, np.ndarray]:
    template = {"params": jax.ShapeDtypeStruct((400, 1000), jnp.float32)}
    found = Checkpointer(directory, CheckpointConfig(keep=3)).restore(template)
    assert found is not None
    return found.step, np.asarray(found.state["params"])


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "/".join(["a_rather_long_name"] * 5)  # Orbax gives the reason last
    process = _saver(directory, "full")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert "checkpoint 2 could not be written" in output
    assert "File too large" in output
    assert "checkpoint 1 is untouched" in output
    step, array = _newest(directory)
    assert step == 1
    np.testing.assert_array_equal(array, jax.random.normal(jax.random.key(1), (400, 1000)))
    assert not list(directory.glob("2*"))


@pytest.mark.parametrize("delay", [0.03, 0.11, 0.17])
def test_a_kill_during_a_save_leaves_a_usable_checkpoint(tmp_path: Path, delay: float) -> None:
    with _saver(tmp_path, "kill") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    step, array = _newest(tmp_path)
    np.testing.assert_array_equal(array, jax.random.normal(jax.random.key(step), (400, 1000)))
