"""Training with Switch layers: the reader's step, encoders, devices with experts, resumed runs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax import from_gin
from atlas_jax.core.config import clear_gin, load_gin
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.models.folder import load_model
from atlas_jax.training.encoder_start import open_start
from atlas_jax.training.encoder_texts import EncoderBatch
from atlas_jax.training.encoder_trainer import pretrain_encoder
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.pretrain_loss import PretrainingLoss, tables_of
from atlas_jax.training.speed import encoder_flops
from atlas_jax.training.trainer import train
from tests.training.encoder_runs import check_ten_steps_and_a_killed_run
from tests.training.runs import write_run
from tests.training.test_encoder_trainer import SIZES, WORDS, run, texts
from tests.training.test_step import SINGLE, Run, assert_close

__all__ = ["texts"]  # a fixture

SMALL: dict[str, Any] = {**SIZES, "encoder": "bert", "encoder_options": {"num_experts": 4}}
READER = {"num_experts": 4, "expert_every": 1, "balance_weight": 0.5}


@pytest.mark.slow
def test_a_mesh_with_experts_takes_the_step_of_a_single_device() -> None:
    single_state, single = Run(SINGLE, 1, reader=READER)()
    mesh = MeshConfig(data=2, model=2, expert=2)
    sharded = Run(mesh, 8, reader=READER)
    kernel = sharded.state.params["reader"]["encoder"]["layers_0"]["mlp"]["expert"]["wo"]["kernel"]
    assert kernel.shape == (4, 32, 16)
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)
    state, metrics = sharded()
    assert 1 <= single["reader_balance_loss"] < 4 and 0 < single["reader_dropped_share"] < 0.5
    assert_close(single, metrics)
    assert_close(single_state.params, state.params)


@pytest.mark.slow
def test_the_balance_loss_counts_in_the_readers_loss() -> None:
    """Without a weight, the first step of the same model has the same figures but for its loss."""
    _, weighed = Run(SINGLE, 1, reader=READER, training="fixed")(1)
    _, free = Run(SINGLE, 1, reader={**READER, "balance_weight": 0.0}, training="fixed")(1)
    assert weighed["reader_balance_loss"] == pytest.approx(free["reader_balance_loss"], rel=1e-6)
    more = 0.5 * weighed["reader_balance_loss"]
    assert weighed["reader_loss"] == pytest.approx(free["reader_loss"] + more, rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_of_a_reader_with_experts_ends_alike_and_answers(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    states = []
    for name, stops in (("whole", (10,)), ("parts", (6, 10))):
        for steps in stops:
            bindings = {
                "TrainConfig.model_dir": f"'{tmp_path / name}'", "TrainConfig.total_steps": steps,
                "CheckpointConfig.every": 6, "ReaderConfig.num_experts": 4,
                "ReaderConfig.expert_every": 1, "EXPERT_PARALLEL": 4,
            }  # fmt: skip
            clear_gin()
            load_gin([str(gin_file), "mesh/expert.gin"], [f"{k}={v}" for k, v in bindings.items()])
            state = train(from_gin.train_run())
        states.append(jax.device_get(state))
        rows = [row for row in read_metrics(tmp_path / name) if "train/reader_loss" in row]
        assert len(rows) == 10 and all(row["train/reader_balance_loss"] >= 1 for row in rows)
    jax.tree.map(np.testing.assert_array_equal, *states)
    reader = load_model(tmp_path / "parts" / "final", ("reader",))["reader"]
    assert reader.config["num_experts"] == 4
    experts = reader.params["encoder"]["layers_0"]["mlp"]["expert"]["wo"]["kernel"]
    assert experts.shape == (4, 32, 16)


def test_an_encoders_loss_has_its_balance() -> None:
    config = EncoderModelConfig(**{**SMALL, "dropout_rate": 0.0, "heads": ("mlm",)})
    tables = tables_of(np.ones(57, bool), (0, 1, 2, 3, 4), 4)
    loss = PretrainingLoss(config, WORDS, tables)
    tokens = np.random.default_rng(0).integers(5, 57, (4, 20)).astype(np.int32)
    tokens[:, 0], tokens[1, 9:] = 2, 0
    model: Any = EncoderModel(config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.asarray(tokens))["params"])
    batch = EncoderBatch(tokens, np.zeros_like(tokens), np.zeros(4, np.int32))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = step(params, jax.random.key(1), batch)
    expected = metrics["mlm_loss"] + 0.01 * metrics["balance_loss"]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert metrics["balance_loss"] >= 1 and 0 <= metrics["dropped_share"] < 1
    router = gradient["encoder"]["layers_1"]["mlp"]["router"]["router_weights"]["w"]["kernel"]
    assert np.abs(router).max() > 0
    quiet = dataclasses.replace(loss, deterministic=True)
    _, evaluated = jax.jit(lambda *args: quiet(*args))(params, jax.random.key(1), batch)
    assert evaluated["dropped_share"] <= metrics["dropped_share"]  # a larger capacity
    # Model FLOPs: of the experts' kernels each token uses a quarter, of the router's the whole.
    h, f, tokens_read = 8, 16, 80
    plain, switch = 4 * h * h + 2 * h * f, 4 * h * h + 2 * h * f + 4 * h
    assert encoder_flops(params, params, tokens_read) == 6 * (plain + switch) * tokens_read


@pytest.mark.slow
def test_the_gin_file_runs_ten_steps_and_a_killed_run_ends_alike(texts: Path) -> None:
    files = ["--gin_file=runs/switch_encoder.gin", "--gin_file=mesh/expert.gin"]
    more = [*files, "--gin.NUM_EXPERTS=4", "--gin.EXPERT_PARALLEL=4"]
    *_, folder = check_ten_steps_and_a_killed_run(
        texts, "switch", more, "train/mlm_loss", "train/balance_loss"
    )
    kernel = load_encoder(folder / "final").params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    assert kernel["kernel"].shape == (4, 8, 16)
    with pytest.raises(UserError, match="has 4 experts, which only pretrain_encoder trains"):
        open_start(str(folder / "final"), "", {}, DeltaConfig(), "sentence", 2, "sst2", 0, True)


@pytest.mark.slow
def test_an_encoder_on_devices_with_experts_learns_what_one_device_does(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight, found = jax.devices(), []
    for devices, mesh in ((eight, MeshConfig(data=2, expert=4)), (eight[:1], MeshConfig())):
        monkeypatch.setattr(jax, "devices", lambda *_, chosen=devices: chosen)
        name = f"switch_on_{len(devices)}"
        told = run(texts, name, WORDS, objectives=("mlm", "sop"), total_steps=3)
        fields = {**SMALL, "dropout_rate": 0.1, "encoder": "electra"}
        fields["encoder_options"] = {"num_experts": 4, "expert_every": 1, "factor_dim": 8}
        pretrain_encoder(dataclasses.replace(told, encoder=fields, devices=Devices(mesh)))
        found.append(read_metrics(texts / name)[-1])
    for key in ("loss", "mlm_loss", "sop_loss", "balance_loss", "dropped_share", "grad_norm"):
        assert found[1][f"train/{key}"] == pytest.approx(found[0][f"train/{key}"], rel=1e-4), key
