"""SpanBERT's boundary objective: loss and gradients against NumPy, spans that touch, refusals."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.encoders.heads import BOUNDARY_PLACES
from atlas_jax.encoders.masking import MaskingConfig, mask_tokens
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.encoders.objectives import beside_spans, unified_masks
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training.encoder_texts import EncoderBatch
from atlas_jax.training.encoder_trainer import pretrain_encoder
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.pretrain_loss import PretrainingLoss, tables_of
from tests.training.test_encoder_trainer import run, texts

__all__ = ["texts"]  # a fixture

SPANS = MaskingConfig("span", rate=0.7)
LENGTH, VOCAB = 48, 30
CONFIG = EncoderModelConfig(
    vocab_size=VOCAB, hidden_dim=8, num_layers=1, num_heads=2, mlp_dim=16, max_positions=LENGTH,
    dropout_rate=0.0, encoder="albert", encoder_options={"factor_dim": 6},
    heads=("mlm", "boundary"),
)  # fmt: skip


def made() -> tuple[PretrainingLoss, Any, EncoderBatch]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, VOCAB, (3, LENGTH)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    tokens[2, 20], tokens[2, 21:] = 3, 0
    starts = rng.random(VOCAB) < 0.3  # long words: spans beyond the head's places
    loss = PretrainingLoss(
        CONFIG, SPANS, tables_of(starts, (0, 1, 2, 3, 4), 4), spans=True, deterministic=True
    )
    shapes = meta.unbox(
        jax.eval_shape(EncoderModel(CONFIG).init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    )["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    zeros = np.zeros_like(tokens)
    return loss, params, EncoderBatch(tokens, zeros, zeros[:, 0])


def by_hand(head: Any, table: np.ndarray, states: np.ndarray, masked: Any) -> tuple[float, int]:
    """The loss in float64, span by span, and the length of the longest span."""

    def norm(x: np.ndarray, one: Any) -> np.ndarray:
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-12)
        return x * np.asarray(one["scale"], np.float64) + np.asarray(one["bias"], np.float64)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    total, count, longest = 0.0, 0, 0
    for row, run_l in enumerate(np.asarray(masked.run_bl)):
        labels = dict(zip(masked.positions_bp[row].tolist(), masked.labels_bp[row].tolist(),
                          strict=True))  # fmt: skip
        at = 0
        while at < len(run_l):
            if run_l[at] < 0:
                at += 1
                continue
            first = at
            while run_l[at] >= 0:
                at += 1
            longest = max(longest, at - first)
            for place in range(min(at - first, BOUNDARY_PLACES)):
                position = np.asarray(head["position_embeddings"]["embedding"])[place]
                x = np.concatenate([states[row, first - 1], states[row, at], position])
                for number in range(2):
                    one = head[f"transform_{number}"]
                    x = x @ np.asarray(one["kernel"], np.float64) + np.asarray(one["bias"])
                    x = norm(gelu(x), head[f"layer_norm_{number}"])
                logits = x @ table.T + np.asarray(head["bias"])
                total += np.log(np.exp(logits).sum()) - logits[labels[first + place]]
                count += 1
    return total / count, longest


def test_the_objective_and_its_gradient_are_numpys() -> None:
    loss, params, batch = made()
    key = jax.random.key(3)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, key, batch)
    np.testing.assert_allclose(value, metrics["mlm_loss"] + metrics["sbo_loss"], rtol=1e-6)
    tables = loss.tables
    masked = mask_tokens(
        SPANS, jnp.asarray(batch.tokens_bl), jnp.asarray(tables.starts_v)[batch.tokens_bl],
        jnp.asarray(tables.special_v)[batch.tokens_bl], jax.random.split(key, 4)[0], 4, VOCAB,
    )  # fmt: skip
    states: Any = EncoderModel(CONFIG).apply({"params": params}, masked.tokens_bl, method="states")
    states = np.asarray(states, np.float64)
    table = np.asarray(params["encoder"]["embeddings"]["word_embeddings"]["embedding"], np.float64)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["boundary"])
    expected, longest = by_hand(head, table, states, masked)
    assert longest > BOUNDARY_PLACES  # the rest of such a span is not predicted
    np.testing.assert_allclose(metrics["sbo_loss"], expected, rtol=1e-5)
    for path, place in (("transform_0", (5, 3)), ("transform_0", (12, 1)), ("transform_1", (2, 4))):
        moved = []
        for step in (1e-5, -1e-5):
            other = jax.tree.map(np.copy, head)
            other[path]["kernel"][place] += step
            moved.append(by_hand(other, table, states, masked)[0])
        slope = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(grads["boundary"][path]["kernel"][place], slope, rtol=1e-3,
                                   atol=1e-6)  # fmt: skip
    flows = jax.grad(lambda p: loss(p, key, batch)[1]["sbo_loss"])(params)["encoder"]
    assert all(
        np.abs(x).max() > 0 for x in jax.tree.leaves(flows["groups_0"]["layers_0"]["output"])
    )


def test_spans_that_touch_are_one() -> None:
    chosen = jnp.array([[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]], bool)
    left, right = (np.asarray(x) for x in beside_spans(chosen))
    assert left[np.asarray(chosen)].tolist() == [0, 0, 3, 1, 1, 1, 1]
    assert right[np.asarray(chosen)].tolist() == [3, 3, 5, 6, 6, 6, 6]


@pytest.mark.slow
def test_a_run_learns_it_and_keeps_its_head(texts: Path) -> None:
    told = run(texts, "spans", SPANS, objectives=("mlm", "sbo"), total_steps=3)
    pretrain_encoder(told)
    assert load_encoder(texts / "spans" / "final", ("mlm", "boundary")).config.heads
    rows = read_metrics(texts / "spans")
    assert {"train/sbo_loss", "train/sbo_accuracy"} <= set(rows[0])


def test_one_sided_rows_do_not_read_the_other_side() -> None:
    """UniLM: predictions of a row under a one-sided mask do not change with the tokens beyond."""
    loss, params, batch = made()
    unified = dataclasses.replace(
        loss, spans=False, unified=True, config=dataclasses.replace(CONFIG, heads=("mlm",))
    )
    key = jax.random.key(1)
    keys = jax.random.split(key, 4)
    masks = unified_masks(jax.random.fold_in(keys[2], 2), jnp.asarray(batch.tokens_bl) != 0)
    value, metrics = jax.jit(lambda *args: unified(*args))(params, key, batch)
    np.testing.assert_allclose(value, metrics["mlm_loss"])
    model: Any = EncoderModel(unified.config)
    states = model.apply({"params": params}, batch.tokens_bl, method="states", mask=masks)
    tokens = np.array(batch.tokens_bl)
    tokens[:, 9] = 7
    other = model.apply({"params": params}, tokens, method="states", mask=masks)
    unmoved = np.abs(np.asarray(states - other)).max(axis=-1) < 1e-6
    for row in range(3):
        seen = np.asarray(masks[row, :, 9])
        real = tokens[row] != 0  # padding reads nothing in particular
        assert unmoved[row][~seen & real].all() and not unmoved[row][seen & real].all()


def test_what_does_not_fit_together_is_refused(texts: Path) -> None:
    with pytest.raises(UserError, match="MaskingConfig.kind = 'token': expected 'span' with the"):
        run(texts, "bad", objectives=("mlm", "sbo"))
    for objectives in (("sbo",), ("electra", "sbo"), ("unilm", "mlm"), ("unilm", "sop")):
        with pytest.raises(UserError, match="EncoderTrainConfig.objectives"):
            run(texts, "bad", SPANS, objectives=objectives)
    assert dataclasses.replace(SPANS, rate=0.15).width(LENGTH) == 8
