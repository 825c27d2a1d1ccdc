"""On a mesh of 4 x 2 devices the reader computes what it computes on one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core.partitioning import (
    STANDARD_RULES,
    MeshConfig,
    Rule,
    activate,
    make_mesh,
    param_shardings,
)
from atlas_jax.reader import fid
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.t5 import T5, pick_logprobs
from tests.reader.small import config, passages, random_params

TOKENS, TARGETS = (np.concatenate([x, x[:1]]) for x in passages())  # four rows, two heads


def train(model: T5, params: Any, tokens: Any, targets: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        encoded = fid.encode(model, params, tokens)
        logits = fid.fused_logits(model, params, encoded, tokens, targets)
        total, count = fid.summed_loss(pick_logprobs(logits, targets), targets)
        return total / count

    return jax.value_and_grad(loss)(params)


def score(model: T5, params: Any, tokens: Any, targets: Any) -> Any:
    encoded = fid.encode(model, params, tokens)
    return (
        fid.passage_logprobs(model, params, encoded, tokens, targets),
        fid.leave_one_out_logprobs(model, params, encoded, tokens, targets),
        fid.cross_attention_mass(model, params, encoded, tokens, targets),
    )


def answer(model: T5, params: Any, tokens: Any, _: Any) -> Any:
    encoded = fid.encode(model, params, tokens)
    b, k, length, d = encoded.shape
    settings = GenerationConfig(max_length=5, method="beam", num_beams=2, eos_id=3)
    mask = tokens.reshape(b, k * length) > 0
    return generate(model, params, encoded.reshape(b, k * length, d), mask, settings)[:2]


def assert_close(ours: Any, expected: Any) -> None:
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def assert_gradient_close(ours: Any, expected: Any) -> None:
    """To 1e-4 of the largest element: CPUs differ in the order in which they sum larger terms."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * max(np.abs(expected).max(), 0.1))


BATCH_RULES = tuple(rule for rule in STANDARD_RULES if rule[0] != "rows")
SEQUENCE_RULES = (*BATCH_RULES, ("length", "model"), ("source", "model"))  # mesh/sequence.gin
PASSAGES_RULES = (  # of gin/mesh/passages.gin, without those that no array of a reader has
    *(rule for rule in STANDARD_RULES if rule[0] in ("rows", "batch")),
    ("source", "model"),
    ("embed", ("fsdp", "model")),
)


@pytest.mark.parametrize(
    "rules",
    [STANDARD_RULES, SEQUENCE_RULES, PASSAGES_RULES],
    ids=["standard", "sequence", "passages"],
)
@pytest.mark.parametrize(
    ("compute", "scan_layers"), [(train, False), (train, True), (score, False), (answer, False)]
)
def test_mesh_equals_one_device(
    compute: Callable[..., Any], scan_layers: bool, rules: Sequence[Rule]
) -> None:
    model = T5(config(scan_layers=scan_layers))
    params = random_params(model)
    expected = jax.jit(compute, static_argnums=0)(model, params, TOKENS, TARGETS)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1, 0], TARGETS[:1])["params"]
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with activate(mesh, rules):
        placed = jax.device_put(params, param_shardings(boxed, mesh, rules))
        data = [jax.device_put(x, rows) for x in (TOKENS, TARGETS)]
        ours = jax.jit(compute, static_argnums=0)(model, placed, *data)
    # Tokens, being integers, are equal or far apart.
    jax.tree.map(assert_gradient_close if compute is train else assert_close, ours, expected)


def test_passages_are_encoded_on_all_devices_and_nothing_is_summed_over_them() -> None:
    model = T5(config())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS[:1, 0], TARGETS[:1])["params"]

    def program(rules: Sequence[Rule]) -> str:
        with activate(mesh, rules):
            placed = param_shardings(boxed, mesh, rules)
            params = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                meta.unbox(boxed),
                placed,
            )
            run = jax.jit(lambda params, tokens: fid.encode(model, params, tokens))
            return str(run.lower(params, TOKENS).compile().as_text())

    assert TOKENS.shape[0] * TOKENS.shape[1] % mesh.size == 0
    assert "all-reduce" in program(BATCH_RULES)  # of each layer's activations, over `model`
    assert "all-reduce" not in program(STANDARD_RULES)
