"""Bytes and collectives, from programs compiled here and from a piece of TPU text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.planning.hlo import Collective, Program

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (p: (s32[], bf16[8,128], bf16[6,64,128])) -> (s32[], bf16[8,128], bf16[6,64,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[6,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %slice = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%w, %i), dynamic_slice_sizes={1,64,128}
  %gathered = bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%slice), channel_id=1, replica_groups=[4,2]<=[8], dimensions={1}
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%x, %gathered), dim_labels=bf_io->bf
  ROOT %t = (s32[], bf16[8,128], bf16[6,64,128]) tuple(%i, %y, %w)
}

%cond.1 (p: (s32[], bf16[8,128], bf16[6,64,128])) -> pred[] {
  %p = (s32[], bf16[8,128], bf16[6,64,128]) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main.2 (x: bf16[8,128], w: bf16[6,64,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,128], bf16[6,64,128]) tuple(%zero, %x, %w)
  %loop = (s32[], bf16[8,128], bf16[6,64,128]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def compiled_text(function: Any, *args: Any, **shardings: Any) -> str:
    return jax.jit(function, **shardings).lower(*args).compile().as_text()


def test_tpu_text_runs_its_loop_six_times_and_leaves_on_chip_memory_out() -> None:
    program = Program(TPU_TEXT)
    assert program.collectives == [Collective("all-gather", 64 * 128 * 2, 2, 6.0)]
    slice_bytes, x_bytes = 64 * 128 * 2, 8 * 128 * 2
    # Slice read and written; gathered into on-chip memory; product reads and writes x's shape.
    assert program.hbm_bytes == 6 * (2 * slice_bytes + slice_bytes + 2 * x_bytes)


def test_an_elementwise_sum_reads_two_arrays_and_writes_one() -> None:
    x = jax.ShapeDtypeStruct((1000, 100), jnp.float32)
    assert Program(compiled_text(jnp.add, x, x)).hbm_bytes == 3 * 1000 * 100 * 4


def test_an_all_reduce_is_found_with_its_size_and_group() -> None:
    rows = NamedSharding(MESH, PartitionSpec("b"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)
    text = compiled_text(lambda x: x.sum(0), x)
    (found,) = Program(text).collectives
    assert (found.kind, found.bytes, found.group, found.times) == ("all-reduce", 256 * 4, 4, 1.0)
    assert found.wire_bytes == 2 * 256 * 4 * 3 / 4


@pytest.mark.parametrize("layers", [3, 7])
def test_collectives_in_a_scan_count_for_every_layer(layers: int) -> None:
    split = NamedSharding(MESH, PartitionSpec(None, "b"))
    whole = NamedSharding(MESH, PartitionSpec())
    w = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole)

    def stack(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = Program(compiled_text(stack, x, w, out_shardings=whole)).collectives
    # One in the body; the compiler may take the first layer's out of the loop.
    assert max(one.times for one in found) == layers


def test_a_loop_without_a_count_takes_the_one_given() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.while_loop(lambda y: y[0] < 9, lambda y: jnp.sort(y) + 1, x)

    text = compiled_text(loop, jnp.ones(1000))
    once, five = (Program(text, loop_trips=n).hbm_bytes for n in (1, 5))
    assert 3 < five / once <= 5


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[64,4]<=[256]", 4),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['x'=4,'y'=2,'z'=8], device_ids=([2,4]T(1,0)) {'x','z'}", 32),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_every_way_to_write_groups_is_read(groups: str, size: int) -> None:
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    line = f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%sum\n}}\n"
    assert Program(text + line).collectives[0].group == size


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 300.0),
        ("all-reduce", 150.0),
        ("reduce-scatter", 75.0),
        ("all-to-all", 75.0),
        ("collective-permute", 100.0),
    ],
)
def test_what_a_chip_sends_in_a_ring_of_four(kind: str, sent: float) -> None:
    assert Collective(kind, 100, 4, 1.0).wire_bytes == sent
