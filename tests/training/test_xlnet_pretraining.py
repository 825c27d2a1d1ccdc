"""XLNet's objective in `pretrain_encoder`: loss against NumPy, resumed runs, devices, refusals."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.masking import MaskingConfig, mask_tokens
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.objectives import permutation_masks, with_objectives
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training.encoder_texts import EncoderBatch
from atlas_jax.training.encoder_trainer import pretrain_encoder
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.pretrain_loss import PretrainingLoss, tables_of
from tests.training.encoder_runs import check_ten_steps_and_a_killed_run
from tests.training.test_encoder_trainer import SIZES, run, texts

__all__ = ["texts"]  # a fixture

TARGETS = MaskingConfig("ngram", rate=1 / 6, longest=5, mask_rate=0.0, random_rate=0.0)
SMALL: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name != "encoder_options"},
    "encoder": "xlnet",
}


def test_the_loss_is_that_of_the_targets_in_one_drawn_order() -> None:
    """In NumPy, from the logits of the query stream; no token is replaced, a sixth are targets."""
    config = with_objectives(EncoderModelConfig(**{**SMALL, "dropout_rate": 0.0}), ("xlnet",))
    tables = tables_of(np.ones(57, bool), (0, 1, 2, 3, 4), 4)
    loss = PretrainingLoss(config, TARGETS, tables, permuted=True, deterministic=True)
    tokens = np.random.default_rng(0).integers(5, 57, (3, 24)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    tokens[2, 11:] = [3, *[0] * 12]
    model: Any = EncoderModel(config)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.asarray(tokens))["params"])
    params = jax.tree.map(lambda x: x * 10, params)
    batch = EncoderBatch(tokens, np.zeros_like(tokens), np.zeros(3, np.int32))
    key = jax.random.key(5)
    value, metrics = jax.jit(lambda *args: loss(*args))(params, key, batch)
    keys = jax.random.split(key, 4)
    masked = mask_tokens(
        TARGETS, jnp.asarray(tokens), jnp.ones((3, 24), bool), jnp.asarray(tokens) < 5, keys[0],
        4, 57,
    )  # fmt: skip
    np.testing.assert_array_equal(masked.weights_bp.sum(1), [4, 4, 2])  # round(n / 6)
    np.testing.assert_array_equal(masked.tokens_bl, tokens)
    content, query = permutation_masks(
        keys[1], jnp.asarray(tokens) > 0, masked.positions_bp, masked.weights_bp
    )

    def logits_of(params: Any) -> jax.Array:
        states = model.apply(
            {"params": params}, tokens, method="predicted", positions_bp=masked.positions_bp,
            content_bll=content, query_bpl=query,
        )  # fmt: skip
        found: jax.Array = model.apply({"params": params}, states, method="permuted_logits")
        return found

    logits = np.asarray(jax.jit(logits_of)(params))
    own = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.asarray(masked.labels_bp)[..., None], 2
    )[..., 0]  # fmt: skip
    np.testing.assert_allclose(value, own[np.asarray(masked.weights_bp) > 0].mean(), rtol=1e-5)
    assert metrics["plm_loss"] == value and 0 <= metrics["plm_accuracy"] <= 1


@pytest.mark.slow
def test_the_gin_file_runs_ten_steps_and_a_killed_run_ends_alike(texts: Path) -> None:
    folders = check_ten_steps_and_a_killed_run(
        texts, "xlnet", ["--gin_file=runs/xlnet_base.gin"], "train/plm_loss", "train/plm_loss"
    )
    for folder in folders:
        assert load_encoder(folder / "final", ("plm",)).config.encoder == "xlnet"


@pytest.mark.slow
def test_one_device_computes_what_eight_do(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight, found = jax.devices(), []
    for devices in (eight, eight[:1]):
        monkeypatch.setattr(jax, "devices", lambda *_, chosen=devices: chosen)
        name = f"xlnet_on_{len(devices)}"
        told = run(texts, name, TARGETS, objectives=("xlnet",))
        pretrain_encoder(dataclasses.replace(told, encoder={**SMALL, "dropout_rate": 0.1}))
        found.append(read_metrics(texts / name)[-1])
    for name in ("train/loss", "train/plm_accuracy", "train/grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name


def test_what_does_not_fit_together_is_refused(texts: Path) -> None:
    with pytest.raises(UserError, match="MaskingConfig.mask_rate = 0.8: expected 0 with the"):
        run(texts, "bad", objectives=("xlnet",))
    for objectives in (("xlnet", "mlm"), ("xlnet", "sop")):
        with pytest.raises(UserError, match="EncoderTrainConfig.objectives"):
            run(texts, "bad", TARGETS, objectives=objectives)
    with pytest.raises(UserError, match="EncoderModelConfig.encoder = 'albert': expected 'xlnet'"):
        pretrain_encoder(run(texts, "bad", TARGETS, objectives=("xlnet",)))
    electra = run(texts, "bad", objectives=("electra",))
    with pytest.raises(UserError, match="'xlnet' has no narrower twin"):
        pretrain_encoder(dataclasses.replace(electra, encoder=SMALL))
    with pytest.raises(UserError, match="MaskingConfig.longest = 2: expected 0 with kind = 'tok"):
        MaskingConfig(longest=2)
