"""HBM bytes of single operations: what is sliced counts its slice, what waits counts once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.planning.hlo import Program

# A fusion of the TPU's compiler within a scan over 6 layers: a weight is sliced by a fusion within
# it, a gradient written into its place, and a product given besides.
LAYERS = """HloModule f

%slice_fusion (a: bf16[6,64,128], i: s32[]) -> bf16[64,128] {
  %a = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %bitcast = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%fused (p0: bf16[8,64], p1: bf16[6,64,128], p2: s32[], p3: f32[6,8,128]) -> (f32[6,8,128], bf16[8,128]) {
  %p0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p1, %p2), kind=kLoop, calls=%slice_fusion
  %y = f32[8,128]{1,0:T(8,128)} convolution(%p0, %w), dim_labels=bf_io->bf
  %update = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%y)
  %p3 = f32[6,8,128]{2,1,0:T(8,128)} parameter(3)
  %zero.1 = s32[] constant(0)
  %whole = f32[6,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p3, %update, %p2, %zero.1, %zero.1)
  %narrow = bf16[8,128]{1,0:T(8,128)(2,1)} convert(USED)
  ROOT %both = (f32[6,8,128]{2,1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%whole, %narrow)
}

ENTRY %main (x: bf16[8,64], w: bf16[6,64,128], i: s32[], g: f32[6,8,128]) -> (f32[6,8,128], bf16[8,128]) {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %g = f32[6,8,128]{2,1,0:T(8,128)} parameter(3)
  ROOT %out = (f32[6,8,128]{2,1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) fusion(%x, %w, %i, %g), kind=kOutput, calls=%fused
}
"""  # noqa: E501

# Asynchronous copies as the TPU's compiler writes them, into and out of its on-chip memory S(1).
COPIES = """HloModule f

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[64,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:128]}
  %sd = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %in = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %ind = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%in)
  %room = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %out = (bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%ind)
  ROOT %outd = bf16[64,128]{1,0:T(8,128)(2,1)} copy-done(%out)
}
"""  # noqa: E501

# An all-gather that runs beside two products: start, a part of either product, and wait.
CHAIN = """HloModule f

%start (a: bf16[16,128]) -> (bf16[16,128], bf16[64,128], u32[]) {
  %a = bf16[16,128]{1,0} parameter(0)
  %all-gather.1 = bf16[64,128]{1,0} all-gather(%a), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %call.1 = (bf16[16,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (b: bf16[16,128], c: bf16[64,128], m: u32[], q: f32[8,8]) -> (f32[8,8], bf16[16,128], bf16[64,128], bf16[64,128], u32[]) {
  %q = f32[8,8]{1,0} parameter(3)
  %product = f32[8,8]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
  %b = bf16[16,128]{1,0} parameter(0)
  %c = bf16[64,128]{1,0} parameter(1)
  %all-gather.2 = bf16[64,128]{1,0} all-gather(%b), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  %m = u32[]{:S(2)} parameter(2)
  ROOT %t = (f32[8,8]{1,0}, bf16[16,128]{1,0}, bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) tuple(%product, %b, %c, %all-gather.2, %m)
}

%done (d: bf16[16,128], e: bf16[64,128], n: u32[]) -> bf16[64,128] {
  %d = bf16[16,128]{1,0} parameter(0)
  %e = bf16[64,128]{1,0} parameter(1)
  %all-gather.3 = bf16[64,128]{1,0} all-gather(%d), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  %n = u32[]{:S(2)} parameter(2)
  ROOT %call.3 = bf16[64,128]{1,0} custom-call(%d, %e, %all-gather.3, %n), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[16,128], y: f32[8,8]) -> bf16[64,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %begun = (bf16[16,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %x1 = bf16[16,128]{1,0} get-tuple-element(%begun), index=0
  %g1 = bf16[64,128]{1,0} get-tuple-element(%begun), index=1
  %m1 = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %beside = (f32[8,8]{1,0}, bf16[16,128]{1,0}, bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) fusion(%x1, %g1, %m1, %y), kind=kOutput, calls=%async_collective_fusion
  %x2 = bf16[16,128]{1,0} get-tuple-element(%beside), index=1
  %g2 = bf16[64,128]{1,0} get-tuple-element(%beside), index=2
  %m2 = u32[]{:S(2)} get-tuple-element(%beside), index=4
  ROOT %gathered = bf16[64,128]{1,0} fusion(%x2, %g2, %m2), kind=kCustom, calls=%done
}
"""  # noqa: E501

# What the TPU's compiler makes of a reduce-scatter.
SCATTERED = """HloModule f

%all-reduce-scatter.5 (input: f32[128,512]) -> f32[128,128] {
  %input = f32[128,512]{1,0} parameter(0)
  %all-reduce.1 = f32[128,512]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[128,128]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={128,128}
}

ENTRY %main (x: f32[128,512]) -> f32[128,128] {
  %x = f32[128,512]{1,0} parameter(0)
  ROOT %out = f32[128,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.5
}
"""  # noqa: E501


def test_a_fusion_reads_and_writes_only_the_layer_it_is_about() -> None:
    found = Program(LAYERS.replace("USED", "%y")).hbm_bytes
    x, w, gradient, y = 8 * 64 * 2, 64 * 128 * 2, 8 * 128 * 4, 8 * 128 * 2
    assert found == x + w + gradient + y


def test_an_update_that_is_read_again_is_not_in_place() -> None:
    text = LAYERS.replace("USED", "%again").replace(
        "  %narrow", "  %again = f32[8,128]{1,0:T(8,128)} reduce(%whole, %zero.1), dimensions={0}\n"
        "  %narrow"
    )  # fmt: skip
    x, w, gradients, y = 8 * 64 * 2, 64 * 128 * 2, 6 * 8 * 128 * 4, 8 * 128 * 2
    assert Program(text).hbm_bytes == x + w + 2 * gradients + y


def test_asynchronous_copies_move_their_bytes_once() -> None:
    sizes = {one.name: size for one, size, _ in Program(COPIES).traffic}
    assert sizes == {"s": 16 * 128 * 2, "in": 64 * 128 * 2, "out": 64 * 128 * 2}


def test_an_asynchronous_collective_counts_where_it_starts() -> None:
    program = Program(CHAIN)
    (found,) = program.collectives
    assert (found.kind, found.bytes, found.group) == ("all-gather", 16 * 128 * 2, 4)
    sent, received, product = 16 * 128 * 2, 64 * 128 * 2, 8 * 8 * 4
    assert program.hbm_bytes == sent + received + 2 * product


def test_a_reduce_scatter_is_told_from_an_all_reduce() -> None:
    program = Program(SCATTERED)
    (found,) = program.collectives
    assert (found.kind, found.wire_bytes) == ("reduce-scatter", 128 * 512 * 4 * 3 / 4)
    assert program.hbm_bytes == 128 * 512 * 4 + 128 * 128 * 4


def update(x: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(x, jnp.tanh(x[0]), i, 0)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: jnp.tanh(x @ w) + 1, [(64, 128), (128, 256)]),
        (lambda x: jnp.sum(x * 2, axis=0), [(64, 128)]),
        (lambda x, y: jnp.concatenate([x, jnp.exp(y)]), [(64, 128), (32, 128)]),
        (lambda x: jnp.exp(x[3:5]), [(64, 128)]),
        (lambda x, i: jnp.exp(jax.lax.dynamic_index_in_dim(x, i)), [(64, 128), ()]),
        (update, [(64, 128), ()]),
    ],
)
def test_without_loops_as_many_bytes_move_as_xla_says(
    function: Callable[..., Any], shapes: list[tuple[int, ...]]
) -> None:
    args = [jax.ShapeDtypeStruct(s, jnp.float32 if s else jnp.int32) for s in shapes]
    in_place = (0,) if function is update else ()
    compiled = jax.jit(function, donate_argnums=in_place).lower(*args).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert Program(compiled.as_text()).hbm_bytes == pytest.approx(expected, rel=0.02, abs=64)
