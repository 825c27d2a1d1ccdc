"""Seconds per step hold no compilation, evaluation, checkpoint or refresh."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_jax.answering.evaluation import Evaluation
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.train import main as train_main
from atlas_jax.training import speed
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.speed import StepClock
from tests.training.runs import write_run

STEP, ELSE = 1000.0, 1_000_000.0  # seconds


class FakeTime:
    """The real time, and what functions are made to take beside it without sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added, self.calls = 0.0, list[str]()
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(
            speed, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + self.added)
        )

    def slow(self, owner: Any, name: str, seconds: Callable[..., float]) -> None:
        """Let a method take `seconds(*its arguments)` more."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def slowed(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.added += seconds(*args)
            self.calls.append(name)
            return result

        self._monkeypatch.setattr(owner, name, slowed)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_time_begins_after_the_first_step_and_stops_in_a_pause(fake_time: FakeTime) -> None:
    clock = StepClock()
    fake_time.added += 100
    with clock.paused(()):  # before any step
        fake_time.added += 100
    clock.stepped(())
    assert clock.lap() is None
    for _ in range(4):
        fake_time.added += 3
        clock.stepped(())
        with clock.paused(()):
            fake_time.added += 100
    assert clock.lap() == pytest.approx(3, abs=1)
    assert clock.lap() is None
    fake_time.added += 5
    clock.stepped(())
    assert clock.lap() == pytest.approx(5, abs=1)


def test_few_steps_are_under_way_at_a_time() -> None:
    under_way, most = set[int](), list[int]()

    class Results:
        def __init__(self, step: int) -> None:
            self.step = step
            under_way.add(step)

        def block_until_ready(self) -> None:
            under_way.difference_update(range(self.step + 1))

    clock = StepClock()
    for step in range(50):
        results = Results(step)
        most.append(len(under_way))
        clock.stepped(results)
    assert most[:8] == [1, 1, 2, 3, 4, 5, 5, 5]
    assert max(most) == speed.STEPS_AHEAD + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "fresh",
    [("RefreshPolicy.schedule='2'",), ("RefreshPolicy.rolling_rows=4", "StalenessConfig.every=2")],
    ids=["full", "rolling"],
)
def test_a_step_is_timed_without_what_a_run_does_between_steps(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    fresh: tuple[str, ...],
    fake_time: FakeTime,
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    fake_time.slow(CompiledOnce, "__call__", lambda _, step, *rest: ELSE if step == 1 else STEP)
    fake_time.slow(Evaluation, "run", lambda *_: ELSE)
    fake_time.slow(Checkpointer, "save", lambda *_: ELSE)
    fake_time.slow(Corpus, "refresh", lambda *_: ELSE)
    # A slice counts, but not the first one, which is compiled, nor where the meter measures it.
    rolled = fake_time.calls
    fake_time.slow(Corpus, "roll", lambda *_: STEP if "roll" in rolled else ELSE)
    fake_time.slow(Corpus, "embeddings_of", lambda *_: ELSE)  # the staleness meter's
    settings = (
        f"TrainConfig.model_dir={tmp_path / 'run'}",
        "TrainConfig.total_steps=9",
        "TrainConfig.eval_every=3",
        "StepConfig.retriever_training=joint",
        "CheckpointConfig.every=2",
        "StalenessConfig.k=2",
        "StalenessConfig.passages=8",
        *fresh,
    )
    assert train_main([f"--gin_file={gin_file}", *(f"--gin.{one}" for one in settings)]) == 0
    calls = fake_time.calls
    assert [calls.count(one) for one in ("__call__", "run", "save")] == [9, 3, 5]
    other = ("refresh",) if "schedule" in fresh[0] else ("roll", "embeddings_of")
    assert all(calls.count(one) >= 4 for one in other)

    rows = [row for row in read_metrics(tmp_path / "run") if "train/reader_loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert "train/seconds_per_step" not in rows[0]
    assert "train/tokens_per_second" not in rows[0]
    slices = [0] * 8 if "schedule" in fresh[0] else [0, 0, 1, 0, 1, 0, 1, 0]
    timed = [row["train/seconds_per_step"] for row in rows[1:]]
    assert timed == pytest.approx([STEP * (1 + one) for one in slices], abs=STEP / 4)
