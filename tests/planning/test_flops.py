"""Products counted from a jaxpr, against formulas and against the compiler."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.planning.flops import matmul_flops
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5

READER = ReaderConfig(
    vocab_size=512, emb_dim=64, num_heads=2, head_dim=32, mlp_dim=256, num_encoder_layers=2,
    num_decoder_layers=2, dropout_rate=0.0,
)  # fmt: skip
SOURCE, TARGET = (4, 32), (4, 8)


def reader_loss(config: ReaderConfig, gradient: bool = True) -> tuple[Any, Any]:
    model = T5(config)
    source, target = jnp.ones(SOURCE, jnp.int32), jnp.ones(TARGET, jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), source, target))

    def loss(params: Any) -> Any:
        return jnp.sum(model.apply(params, source, target))

    return (jax.grad(loss) if gradient else loss), params


def count(config: ReaderConfig, gradient: bool = True, **counting: Any) -> float:
    function, params = reader_loss(config, gradient)
    return matmul_flops(jax.make_jaxpr(function)(params), **counting)


def test_a_product_counts_two_for_each_multiplication() -> None:
    jaxpr = jax.make_jaxpr(jnp.matmul)(jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11)))
    assert matmul_flops(jaxpr) == 2 * 3 * 5 * 7 * 11


def test_the_readers_forward_pass_is_the_textbook_sum() -> None:
    n, l, t, d, f, v = 4, 32, 8, 64, 256, 512  # noqa: E741
    width, cfg = 64, READER  # heads x head_dim
    encoder = 8 * n * l * d * width + 4 * n * l * l * width + 6 * n * l * d * f
    decoder = (
        8 * n * t * d * width + 4 * n * t * t * width  # self-attention
        + 4 * n * t * d * width + 4 * n * l * d * width + 4 * n * t * l * width  # cross-attention
        + 6 * n * t * d * f
    )  # fmt: skip
    buckets, heads = cfg.relpos_buckets, cfg.num_heads
    positions = 2 * heads * buckets * ((2 * l - 1) + (2 * t - 1))
    expected = 2 * encoder + 2 * decoder + 2 * n * t * d * v + positions
    assert count(cfg, gradient=False) == expected


def test_the_compiler_counts_the_same_products() -> None:
    """Its figure has the norms and the softmax in it, which ours leaves out."""
    function, params = reader_loss(READER)
    compiled = jax.jit(function).lower(params).compile()
    theirs = compiled.cost_analysis()["flops"]
    assert 0.88 < count(READER) / theirs < 1.0


def test_a_scanned_stack_counts_like_an_unrolled_one() -> None:
    scanned = dataclasses.replace(READER, scan_layers=True)
    assert count(scanned) == count(READER)
    assert count(scanned, scan_once=True) < 0.7 * count(READER)


def test_rematerialisation_repeats_products() -> None:
    minimal = count(dataclasses.replace(READER, remat_policy="minimal"))
    full = count(dataclasses.replace(READER, remat_policy="full"))
    assert count(READER) < minimal <= full < 1.4 * count(READER)


def test_a_loop_without_a_fixed_end_counts_as_often_as_told() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x)

    jaxpr = jax.make_jaxpr(loop)(jnp.ones((4, 4)))
    assert matmul_flops(jaxpr, loop_trips=5) == 5 * 2 * 4**3


@pytest.mark.parametrize("wide", [3, 30])
def test_of_two_branches_the_usual_one_counts(wide: int) -> None:
    def choose(x: Any, y: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, lambda: jnp.sum(x @ x), lambda: jnp.sum(y.T @ y))

    jaxpr = jax.make_jaxpr(choose)(jnp.ones((10, 10)), jnp.ones((10, wide)))
    assert matmul_flops(jaxpr) == 2 * 1000
