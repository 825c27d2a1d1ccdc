"""Rates, utilisation and traces."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import gin
import jax
import jax.numpy as jnp
import pytest

from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.training.speed import (
    PROFILE_FLAG,
    ProfileConfig,
    Speed,
    Tracer,
    add_profile_flag,
    step_flops,
)
from atlas_jax.training.step import StepConfig

# 4 queries of 6 tokens for the retriever, targets of 5; k = 3 passages of 7, inputs of 10.
BATCH = SimpleNamespace(
    query_tokens_bq=jnp.zeros((4, 8)),
    retriever_tokens_br=jnp.zeros((4, 6)),
    target_tokens_bt=jnp.zeros((4, 5)),
)


def kernel(size: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.zeros((1, size))}


PARAMS = {
    "reader": {
        "encoder": {
            "layers_0": {"attention": {"key": kernel(100)}, "norm": {"scale": jnp.ones(9)}}
        },
        "decoder": {
            "layers_0": {
                "self_attention": {"key": kernel(30), "value": kernel(30)},
                "encoder_decoder_attention": {"key": kernel(7), "value": kernel(5)},
            }
        },
        "token_embedder": {"embedding": jnp.zeros((20, 2))},
    },
    "retriever": {"encoder": {"layers_0": kernel(50)}},
}


@pytest.mark.parametrize(
    ("training", "k", "passage", "flops"),
    [
        # (encoder + cross-attention) * tokens read + (decoder + logits) * target tokens
        ("fixed", 1, 0, 6 * (112 * 4 * 10 + 100 * 4 * 5)),
        ("fixed", 3, 7, 6 * (112 * 4 * 3 * 10 + 100 * 4 * 5) + 2 * 50 * 4 * 6),
        ("query_side", 3, 7, 6 * (112 * 4 * 3 * 10 + 100 * 4 * 5 + 50 * 4 * 6)),
        ("joint", 3, 7, 6 * (112 * 4 * 3 * 10 + 100 * 4 * 5 + 50 * 4 * 6 + 50 * 4 * 3 * 7)),
    ],
)
def test_flops_are_counted_by_what_reads_which_tokens(
    training: str, k: int, passage: int, flops: float
) -> None:
    config = StepConfig(k=3, reader_length=10, retriever_training=training)  # type: ignore[arg-type]
    assert step_flops(PARAMS, BATCH, config, k, passage) == flops  # type: ignore[arg-type]


def test_rates_follow_from_the_time_of_a_step() -> None:
    config = StepConfig(k=3, reader_length=10, retriever_training="fixed")
    arguments = (PARAMS, BATCH, config, 3, 7)
    found = Speed(*arguments).of(0.5)  # type: ignore[arg-type]
    assert found["tokens_per_second"] == (4 * 3 * 10 + 4 * 5) / 0.5
    assert found["passages_per_second"] == 12 / 0.5
    assert "mfu" not in found  # nobody knows the peak of this CPU
    gin.bind_parameter("ProfileConfig.peak_flops", 1e6)
    found = Speed(*arguments).of(0.5)  # type: ignore[arg-type]
    flops = step_flops(*arguments)  # type: ignore[arg-type]
    assert found["mfu"] == pytest.approx(flops / 0.5 / (1e6 * jax.device_count()))


@pytest.mark.parametrize(
    ("told", "memory"),
    [
        (
            [
                {"bytes_in_use": 3_000_000_000, "peak_bytes_in_use": 4_500_000_000},
                {"bytes_in_use": 2_000_000_000, "peak_bytes_in_use": 7_250_000_000},
            ],
            {"hbm_gb": 3.0, "hbm_peak_gb": 7.25},
        ),
        ([None, {"bytes_in_use": 1_000_000_000}], {"hbm_gb": 1.0}),
        ([None, None], {}),  # the CPU's backend tells nothing
    ],
)
def test_memory_is_that_of_the_fullest_device(
    told: list[dict[str, int] | None],
    memory: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = [SimpleNamespace(memory_stats=lambda one=one: one) for one in told]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    config = StepConfig(k=3, reader_length=10, retriever_training="fixed")
    found = Speed(PARAMS, BATCH, config, 3, 7).of(0.5)  # type: ignore[arg-type]
    assert {name: value for name, value in found.items() if name.startswith("hbm")} == memory


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (1, 2, 3)])
def test_what_is_no_range_of_steps_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="ProfileConfig.steps = .*first, last"):
        ProfileConfig(steps=steps)


def test_a_flag_binds_the_steps() -> None:
    def launched(value: str) -> tuple[int, list[ProfileConfig]]:
        parser, seen = argparse.ArgumentParser(prog="atlas-jax train"), list[ProfileConfig]()
        add_profile_flag(parser)
        arguments = [f"--profile_steps={value}"]

        def main(flags: argparse.Namespace) -> None:
            seen.append(ProfileConfig())

        return launch(main, parser, arguments, tuple_flags=PROFILE_FLAG), seen

    assert launched("10,12") == (0, [ProfileConfig(steps=(10, 12))])
    for wrong in ("12,10", "7,", "soon"):
        assert launched(wrong) == (2, [])


def test_the_steps_asked_for_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda where: calls.append(where))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Tracer(ProfileConfig(steps=(2, 3)), str(tmp_path)) as tracer:
        for step in range(1, 6):
            tracer.before(step)
            calls.append(step)
            tracer.after(step, jnp.zeros(()))
    assert calls == [1, str(tmp_path), 2, 3, "stop", 4, 5]
    calls.clear()
    with Tracer(ProfileConfig(steps=(2, 9)), str(tmp_path)) as tracer:
        tracer.before(3)  # a run that goes on in the middle, and ends before the trace would
    assert calls == [str(tmp_path), "stop"]


@pytest.mark.slow
def test_a_trace_is_written(tmp_path: Path) -> None:
    with Tracer(ProfileConfig(steps=(1, 1)), str(tmp_path)) as tracer:
        tracer.before(1)
        tracer.after(1, jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
