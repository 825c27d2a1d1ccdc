"""Rates, utilisation and traces."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax import from_gin, train_retriever
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.encoders.albert import AlbertConfig
from atlas_jax.encoders.bert import BertConfig
from atlas_jax.encoders.registry import make_encoder
from atlas_jax.index.passages import PassageStore
from atlas_jax.retriever.contrastive import ContrastiveConfig, crop_width
from atlas_jax.train import main as train_main
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.speed import (
    PROFILE_FLAG,
    ProfileConfig,
    Sizes,
    Speed,
    Tracer,
    add_profile_flag,
    contrastive_flops,
    step_flops,
    step_speed,
)
from atlas_jax.training.state import Trains
from tests.training.runs import write_run

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
    sizes = Sizes(Trains(training), 10, k, passage)  # type: ignore[arg-type]
    params: dict[str, Any] = PARAMS
    if training == "query_side":  # which gives each side a tower of its own
        tower = PARAMS["retriever"]["encoder"]
        params = {**PARAMS, "retriever": {"query_encoder": tower, "passage_encoder": tower}}
    assert step_flops(params, BATCH, sizes) == flops  # type: ignore[arg-type]


def test_flops_of_frozen_matrices_are_those_of_the_way_through_them() -> None:
    """Forward and back to the inputs, and for what is trained itself: 2 n each."""
    reader = {**PARAMS["reader"]}
    reader["encoder"] = {
        "layers_0": {"attention": {"key": {**kernel(100), "adapter": {"down": kernel(8)}}}}
    }
    params = {**PARAMS, "reader": reader}

    def flops(*never: str) -> float:
        sizes = Sizes(Trains("fixed", never=never), 10, 1, 0)
        return step_flops(params, BATCH, sizes)  # type: ignore[arg-type]

    assert flops() == 4 * ((100 + 8 + 12) * 40 + 100 * 20) + 2 * 8 * 40
    # No gradient goes through what never trains.
    assert flops() - flops("reader/encoder/*/key/kernel") == 2 * 100 * 40


def test_a_matrix_that_layers_share_counts_as_often_as_it_is_used() -> None:
    """An ALBERT of one group costs what the BERT of its shape costs."""
    fields = {"hidden_dim": 8, "num_layers": 6, "num_heads": 2, "mlp_dim": 16, "vocab_size": 9}
    tokens = jnp.ones((1, 4), int)

    def flops(config: BertConfig) -> float:
        params = jax.eval_shape(make_encoder(config).init, jax.random.key(0), tokens)["params"]
        return contrastive_flops({"encoder": meta.unbox(params)}, 24, 36, False, config.uses)

    bert = flops(BertConfig(**fields))
    projection = 6 * 60 * 4 * 8  # from the narrow tables
    for options in (
        {}, {"num_groups": 4}, {"sharing": "attention"}, {"sharing": "ffn"}, {"sharing": "none"},
    ):  # fmt: skip
        assert flops(AlbertConfig(**fields, factor_dim=4, **options)) == bert + projection
    two = flops(AlbertConfig(**fields, factor_dim=4, inner_groups=2))
    assert two - projection == 2 * bert


@pytest.mark.parametrize(
    ("towers", "slow", "flops"),
    [
        ({"encoder": kernel(50)}, False, 6 * 50 * 24 + 6 * 50 * 36),
        ({"encoder": kernel(50)}, True, 6 * 50 * 24 + 2 * 50 * 36),
        (
            {"query_encoder": kernel(50), "passage_encoder": kernel(20)},
            False,
            6 * 50 * 24 + 6 * 20 * 36,
        ),
    ],
)
def test_flops_of_pretraining_are_those_of_both_sides(
    towers: dict[str, dict[str, jax.Array]], slow: bool, flops: float
) -> None:
    assert contrastive_flops(towers, 24, 36, slow) == flops


def test_rates_follow_from_the_time_of_a_step() -> None:
    arguments = (PARAMS, BATCH, Sizes(Trains("fixed"), 10, 3, 7))
    found = step_speed(*arguments).of(0.5)  # type: ignore[arg-type]
    assert found["tokens_per_second"] == (4 * 3 * 10 + 4 * 5) / 0.5
    assert found["passages_per_second"] == 12 / 0.5
    assert "mfu" not in found  # nobody knows the peak of this CPU
    known = ProfileConfig(peak_flops=1e6)
    found = step_speed(*arguments, profile=known).of(0.5)  # type: ignore[arg-type]
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
    found = Speed(1e6, {"tokens": 5}).of(0.5)
    assert {name: value for name, value in found.items() if name.startswith("hbm")} == memory


@pytest.mark.parametrize("steps", [(3,), (0, 2), (4, 3), (1, 2, 3)])
def test_what_is_no_range_of_steps_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"ProfileConfig\.steps = .*1 or more"):
        ProfileConfig(steps=steps)


def test_a_flag_binds_the_steps() -> None:
    def launched(value: str) -> tuple[int, list[ProfileConfig]]:
        parser, seen = argparse.ArgumentParser(prog="atlas-jax train"), list[ProfileConfig]()
        add_profile_flag(parser)
        arguments = [f"--profile_steps={value}"]

        def main(flags: argparse.Namespace) -> None:
            seen.append(from_gin.told(ProfileConfig))

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


CLOSED_BOOK = ("TrainConfig.passages='none'", "EvalConfig.file=''", "CheckpointConfig.every=0")
TRAINERS = {
    "train": (train_main, "TrainConfig", CLOSED_BOOK, set[str]()),
    "train_retriever": (
        train_retriever.main,
        "RetrieverTrainConfig",
        ("RetrieverTrainConfig.batch_size=8", "RetrieverTrainConfig.log_every=1"),
        {"train/pairs_per_second"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_leaves_a_trace_and_its_speed(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path, name: str
) -> None:
    main, config, others, more = TRAINERS[name]
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    settings = (
        f"{config}.model_dir='{tmp_path / 'run'}'",
        f"{config}.total_steps=3",
        "StepConfig.retriever_training='fixed'",
        "ContrastiveConfig.queue_size=16",
        "ProfileConfig.peak_flops=1e12",
        *others,
    )
    flags = (f"--gin_file={gin_file}", "--profile_steps=2,2", *(f"--gin.{s}" for s in settings))
    assert main(list(flags)) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    timed = {"train/seconds_per_step", "train/tokens_per_second", "train/mfu"} | more
    first, *rows = read_metrics(tmp_path / "run")
    assert not timed & set(first)  # it compiles
    assert len(rows) == 2
    for row in rows:
        assert all(row[one] > 0 for one in timed)
    if name == "train_retriever":
        pairs, tokens = (
            rows[0][f"train/{one}_per_second"] * rows[0]["train/seconds_per_step"]
            for one in ("pairs", "tokens")
        )
        assert pairs == pytest.approx(8)
        tokens_nm = np.asarray(PassageStore.open(tmp_path / "store").retriever_tokens_nm)
        longest = int(np.count_nonzero(tokens_nm, axis=1).max())
        assert tokens == pytest.approx(8 * 2 * crop_width(longest, ContrastiveConfig()))
