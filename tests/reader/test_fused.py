"""Fused attention, its kernels interpreted, against plain attention and against the reader's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import fused_layout
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.fused import UNREAD, Seen, attend
from atlas_jax.core.packing import pack, passage_masks
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig, activate, make_mesh
from atlas_jax.core.partitioning import param_shardings as shardings_of
from atlas_jax.reader import fid
from atlas_jax.reader.t5 import T5
from tests.reader.small import PAIR, config, random_params
from tests.reader.test_packing import LENGTHS, ROWS, TARGETS, TOKENS
from tests.reader.test_soft_prompts import loud

RNG = np.random.default_rng(5)


def normal(*shape: int) -> Any:
    return jnp.asarray(0.5 * RNG.standard_normal(shape), jnp.float32)


def plain(
    q: Any, k: Any, v: Any, seen: Seen, distances: Any, heads: int, factor: Any, weight: Any
) -> Any:
    """As the docstring of `attend` says it, with all logits at once."""
    n, q_len, width = q.shape

    def apart(x: Any) -> Any:
        return x.reshape(n, -1, heads, width // heads).transpose(0, 2, 1, 3)

    q, k, v = apart(q), apart(k), apart(v)
    logits = jnp.einsum("nhqc,nhsc->nhqs", q, k)
    if distances is not None:
        far = np.arange(q_len)[None] - np.arange(q_len)[:, None] + q_len - 1
        logits = logits + distances[:, far][None]
    visible = seen.q_segments[:, :, None] == seen.k_segments[:, None]
    visible &= (seen.k_segments != UNREAD)[:, None]
    if seen.variants_nrs is not None:
        visible &= jnp.repeat(seen.variants_nrs, q_len // seen.variants_nrs.shape[1], axis=1)
    probs = jax.nn.softmax(jnp.where(visible[:, None], logits, -1e10), axis=-1)
    probs = jnp.where(visible[:, None], probs, 0.0)
    if factor is not None:
        probs = probs * factor[:, :, None]
    read = jnp.einsum("nhqs,nhsc->nqhc", probs, v).reshape(n, q_len, width)
    mass = jnp.einsum("nhqs,nq,nhs->ns", probs, weight, jnp.linalg.norm(v, axis=-1)) / heads
    return read, mass


def segments(n: int, length: int) -> Any:
    """Of rows that texts of random lengths share; the last row is empty."""
    found = np.full((n, length), UNREAD, np.int32)
    for row in found[:-1]:
        ends = np.sort(RNG.integers(0, length + 1, 4))
        for number, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
            row[first:last] = number
    return jnp.asarray(found)


def self_attention(n: int, length: int, heads: int) -> tuple[Seen, Any]:
    own = segments(n, length)
    return Seen(own, own), normal(heads, 2 * length - 1)


def source(n: int, r: int, t: int, s: int) -> Seen:
    """Variants that read a random half; no one reads the last third, and one nothing at all."""
    mask = RNG.random((n, r, s)) < 0.5
    mask[:, :, -(s // 3) :] = False
    mask[0, 0] = False
    return Seen.of_source(jnp.asarray(mask), t)


@pytest.mark.parametrize(
    ("q_len", "s", "r", "heads", "channels", "bias"),
    [
        (20, 20, 1, 2, 8, True),  # one tile, padded
        (130, 130, 1, 4, 64, True),  # two tiles and two groups of heads
        (6, 300, 1, 2, 64, False),  # three tiles of keys, the last one empty
        (150, 200, 3, 2, 8, False),  # variants, two tiles of either
    ],
)
def test_it_reads_what_plain_attention_reads(
    q_len: int, s: int, r: int, heads: int, channels: int, bias: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fused_layout, "TILE", 128)
    n, width = 3, heads * channels
    seen, distances = self_attention(n, s, heads) if bias else (source(n, r, q_len // r, s), None)
    arrays = (normal(n, q_len, width), normal(n, s, width), normal(n, s, width), distances)
    d_read, weight = normal(n, q_len, width), jnp.abs(normal(n, q_len))
    factor = jnp.asarray(1.25 * (RNG.random((n, heads, s)) < 0.8), jnp.float32)

    def loss(attention: Any, arrays: Any) -> Any:
        *of_positions, distances = arrays
        dropped = None if asked else factor  # the mass is taken without dropout
        read, mass = attention(*of_positions, seen, distances, heads, dropped, weight)
        return jnp.sum(read * d_read), (read, mass)

    asked = r == 1 and not bias

    def fused(*args: Any) -> Any:
        return attend(*args) if asked else attend(*args[:-1])

    found = jax.jit(jax.grad(functools.partial(loss, fused), has_aux=True))(arrays)
    expected = jax.grad(functools.partial(loss, plain), has_aux=True)(arrays)
    if not asked:
        assert found[1][1] is None
        expected = (expected[0], (expected[1][0], None))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    assert np.abs(found[1][0]).max() > 0.1


def reader(attention: str, **changes: Any) -> T5:
    return T5(config(attention=attention, scan_layers=True, **changes))


def scanned_params() -> Any:
    return jax.tree.map(lambda x: 0.5 * x, random_params(reader("xla")))


@functools.partial(jax.jit, static_argnums=(0, 3))
def signals(model: T5, params: Any, tokens: Any, rows: int) -> dict[str, jax.Array]:
    """What is read from a batch, packed or (rows = 0) padded."""
    given = pack(tokens, rows)[0] if rows else tokens
    enc = fid.encode(model, params, given)
    read = (model, params, enc, given, TARGETS)
    real = jnp.any(passage_masks(given), axis=1).reshape(*enc.shape[:3], 1)
    return {
        "states": jnp.where(real, enc, 0.0),
        "together": fid.fused_logprobs(*read),
        "alone": fid.passage_logprobs(*read),
        "left out": fid.leave_one_out_logprobs(*read),
        "mass": fid.cross_attention_mass(*read),
    }


@pytest.mark.parametrize("rows", [0, ROWS])
def test_the_reader_reads_the_same(rows: int) -> None:
    params = scanned_params()
    found = signals(reader("fused", dropout_rate=0.0), params, TOKENS, rows)
    expected = signals(reader("xla", dropout_rate=0.0), params, TOKENS, rows)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (LENGTHS == 0).any()  # passages without a token are among them


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(model: T5, params: Any, tokens: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(3))
        enc = fid.encode(model, params, tokens, keys[0])
        logp_bt = fid.fused_logprobs(model, params, enc, tokens, TARGETS, keys[1])
        total, count = fid.summed_loss(logp_bt, TARGETS)
        return total / count

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("parts", [None, (8, 1), (4, 2)])
def test_with_dropout_it_trains_the_same_on_one_and_eight_devices(parts: Any) -> None:
    """The draws of the attention's dropout too: they are made for each head and key."""
    params, expected = scanned_params(), None
    expected = loss_and_grad(reader("xla"), params, TOKENS)
    model = reader("fused", remat_policy="full")
    if parts is None:
        found = loss_and_grad(model, params, TOKENS)
    else:
        mesh = make_mesh(MeshConfig(data=parts[0], model=parts[1]))
        ones = np.ones((1, 4), np.int32)
        boxed = jax.eval_shape(reader("xla").init, jax.random.key(0), ones, ones)["params"]
        with activate(mesh):
            placed = jax.device_put(params, shardings_of(boxed, mesh, STANDARD_RULES))
            found = loss_and_grad(model, placed, TOKENS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    table = found[1]["encoder"]["relpos_bias"]["rel_embedding"]
    assert np.abs(table).max() > 1e-3


def test_bfloat16_differs_by_its_rounding_alone() -> None:
    params = scanned_params()
    exact = loss_and_grad(reader("xla", dropout_rate=0.0), params, TOKENS)[0]
    narrow = {
        kind: loss_and_grad(reader(kind, dropout_rate=0.0, dtype="bfloat16"), params, TOKENS)[0]
        for kind in ("xla", "fused")
    }
    assert abs(narrow["fused"] - exact) < 2 * abs(narrow["xla"] - exact) + 0.01 * abs(exact)


def test_a_prefix_is_refused() -> None:
    model = T5(dataclasses.replace(config(), attention="fused"))
    params = loud(DeltaConfig("prefix", length=2))
    with pytest.raises(UserError, match="'fused' cannot read the prefix of an attention"):
        jax.eval_shape(lambda params: fid.encode(model, params, TOKENS), params)


def test_a_pair_encoder_is_refused() -> None:
    with pytest.raises(UserError, match="ReaderConfig.attention = 'fused': must be 'xla' for a"):
        dataclasses.replace(PAIR, attention="fused")


def test_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="ReaderConfig.attention = 'flash': expected 'xla' or"):
        config(attention="flash")
