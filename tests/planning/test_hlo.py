"""Bytes and collectives, from programs compiled here and from a piece of TPU text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.planning.flops import matmul_flops
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


# As the TPU's compiler writes a scan: no known_trip_count, a counter that the condition compares.
COUNTED_TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (p: (s32[], bf16[8,64], bf16[64,64])) -> (s32[], bf16[8,64], bf16[64,64]) {
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %w = bf16[64,64]{1,0} get-tuple-element(%p), index=2
  %y = bf16[8,64]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %one = s32[]{:T(128)} constant(STEP)
  %copied = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%copied, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[8,64]{1,0}, bf16[64,64]{1,0}) tuple(%next, %y, %w)
}

%cond.1 (q: (s32[], bf16[8,64], bf16[64,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %q = (s32[]{:T(128)}, bf16[8,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=DIRECTION
}

ENTRY %main.2 (x: bf16[8,64], w: bf16[64,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,64]{1,0} parameter(1)
  %start = s32[]{:T(128)} constant(START)
  %copy = s32[]{:T(128)} copy(%start)
  %t = (s32[], bf16[8,64], bf16[64,64]) tuple(%copy, %x, %w)
  %loop = (s32[], bf16[8,64], bf16[64,64]) while(%t), condition=%cond.1, body=%body.1
  ROOT %out = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def compiled_text(function: Any, *args: Any, **shardings: Any) -> str:
    return jax.jit(function, **shardings).lower(*args).compile().as_text()


def test_tpu_text_runs_its_loop_six_times_and_leaves_on_chip_memory_out() -> None:
    program = Program(TPU_TEXT)
    assert program.collectives == [Collective("all-gather", 64 * 128 * 2, 2, 6.0, (0, 1))]
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
    ("start", "step", "direction", "runs"),
    [
        ("0", "1", "LT", 24),
        ("4", "1", "LT", 20),
        ("1", "5", "LT", 5),
        ("30", "1", "LT", 0),
        # What cannot be read takes the number that is given, here 7.
        ("0", "1", "GT", 7),
        ("0", "-1", "LT", 7),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_says(
    start: str, step: str, direction: str, runs: int
) -> None:
    text = COUNTED_TEXT.replace("START", start).replace("STEP", step)
    program = Program(text.replace("DIRECTION", direction), loop_trips=7)
    assert program.product_flops == runs * 2 * 8 * 64 * 64


def test_products_in_nested_loops_are_those_of_the_traced_program() -> None:
    def stack(x: Any, w: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    x, w = jnp.ones((8, 64)), jnp.ones((5, 64, 64))
    gradient = jax.grad(stack, argnums=(0, 1))
    compiled = jax.jit(gradient).lower(x, w).compile()
    expected = matmul_flops(jax.make_jaxpr(gradient)(x, w))
    product = 2 * 8 * 64 * 64
    assert expected >= 5 * (4 + 4 + 2 * 4) * product  # forward, again, backward
    assert 0.95 < Program(compiled.as_text()).product_flops / expected <= 1
    assert compiled.cost_analysis()["flops"] < expected / 4  # loops once


def test_of_a_conditional_the_branch_for_true_counts() -> None:
    def choose(x: Any, y: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, lambda: jnp.sum(x @ x), lambda: jnp.sum(y.T @ y))

    x, y = jnp.ones((64, 64)), jnp.ones((64, 96))
    found = Program(compiled_text(choose, x, y)).product_flops
    assert found == 2 * 64**3 == matmul_flops(jax.make_jaxpr(choose)(x, y))


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "nd,df->nf"])
def test_products_with_batch_axes_count_as_traced(equation: str) -> None:
    sizes = dict(b=2, q=16, k=24, h=4, d=32, n=48, f=96)
    args = [jnp.ones([sizes[axis] for axis in term]) for term in equation.split("->")[0].split(",")]
    product = lambda x, y: jnp.einsum(equation, x, y)  # noqa: E731
    text = compiled_text(product, *args)
    assert Program(text).product_flops == matmul_flops(jax.make_jaxpr(product)(*args))


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 1), (0, 2))},
        {"window_strides": (1, 1), "padding": ((0, 0), (-1, 3)), "lhs_dilation": (1, 2)},
        {"window_strides": (1, 2), "padding": ((2, 0), (1, 1)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 3},
    ],
)
def test_padding_of_a_convolution_counts_as_little_as_for_the_compiler(
    options: dict[str, Any],
) -> None:
    groups = options.get("feature_group_count", 1)
    x, w = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 2, 6 // groups, 15))

    def convolve(x: Any, w: Any) -> Any:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, **options, dimension_numbers=names)

    compiled = jax.jit(convolve).lower(x, w).compile()
    assert Program(compiled.as_text()).product_flops == compiled.cost_analysis()["flops"]


def test_passes_of_a_windowed_product_after_the_first_are_told_from_other_traffic() -> None:
    text = COUNTED_TEXT.replace("START", "0").replace("STEP", "1").replace("DIRECTION", "LT")
    assert Program(text).windowed_bytes == 0
    program = Program(text.replace("%body.1", "%wide.windowed_dot_general_body_ag.1.clone"))
    a_pass = (8 * 64 + 64 * 64 + 8 * 64) * 2
    assert 23 * a_pass <= program.windowed_bytes < 23 * (a_pass + 40)  # and the counter
    assert program.windowed_bytes == pytest.approx(program.hbm_bytes * 23 / 24, rel=0.01)


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


# As the TPU's compiler sends to other slices: a part of a collective, through the host.
SEND = """ENTRY %main (x: f32[2,8,128]) -> f32[2,8,128] {
  %x = f32[2,8,128]{2,1,0} parameter(0)
  %after = token[] after-all()
  %send = (f32[2,8,128]{2,1,0}, u32[], token[]) send(%x, %after), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %done = token[] send-done(%send), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="KIND"}
  ROOT %out = f32[2,8,128]{2,1,0} add(%x, %x)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("kind", "target", "found", "slices", "sent"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:7}"', "all-reduce", 2, 1.0),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:7}"', "all-reduce", 4, 1.5),
        ("ALL_GATHER", '"{1,2,3}x{0:7}"', "all-gather", 3, 2.0),
        ("ONE_TO_ONE", "{{200000->100007},{200007->100005}}", "collective-permute", 2, 1.0),
    ],
)
def test_what_a_chip_sends_to_other_slices_is_read(
    kind: str, target: str, found: str, slices: int, sent: float
) -> None:
    program = Program(SEND.replace("KIND", kind).replace("TARGET", target))
    size = 2 * 8 * 128 * 4
    assert program.collectives == [Collective(found, size, slices, 1.0, leaves=True)]
    assert program.collectives[0].wire_bytes == sent * size


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", (0, 1)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", (0, 2)),
        ("source_target_pairs={{0,0},{3,7}}", (3, 7)),
    ],
)
def test_the_members_of_the_first_group_are_told(groups: str, members: tuple[int, ...]) -> None:
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    line = f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%sum\n}}\n"
    assert Program(text + line).collectives[0].members == members


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
