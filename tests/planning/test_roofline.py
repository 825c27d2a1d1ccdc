"""Bounds with and without overlap, and the links that a slice really has."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from atlas_jax.core.partitioning import MESH_AXES, MeshConfig, make_mesh
from atlas_jax.planning.hlo import Collective, Program
from atlas_jax.planning.roofline import Roofline, Sent, Wiring, roofline
from atlas_jax.training.chips import CHIPS, parse_slice


class Place:
    """A device of a slice that is not there."""

    def __init__(self, *coords: int) -> None:
        self.coords = coords


def wiring(name: str, **sizes: int) -> Wiring:
    """A mesh of these sizes on a slice, its devices in the order of their coordinates."""
    where = parse_slice(name)
    places = np.empty(where.chips, object)
    for i, at in enumerate(np.ndindex(*where.shape)):
        places[i] = Place(*at)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Wiring(Fake(places.reshape(shape)), where)  # type: ignore[arg-type]


class Fake:
    """What a wiring asks of a mesh; JAX takes no devices that are not there."""

    def __init__(self, devices: Any) -> None:
        self.devices, self.size = devices, devices.size
        self.shape = dict(zip(MESH_AXES, devices.shape, strict=True))


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("v5e-256", (True, True)),
        ("v5e-128", (False, True)),
        ("v5e-16", (False, False)),
        ("v6e-256", (True, True)),
        ("v5p-64", (False, False, False)),  # 2x4x4
        ("v5p-128", (True, True, True)),  # 4x4x4
        ("v4-32", (False, False, False)),
        ("v4-256", (True, True, True)),
    ],
)
def test_only_whole_axes_are_rings(name: str, closed: tuple[bool, ...]) -> None:
    assert parse_slice(name).closed == closed


@pytest.mark.parametrize(
    ("name", "sizes", "axes", "links"),
    [
        ("v5e-16", {"fsdp": 4, "model": 4}, ("model",), 1),  # a line of four
        ("v5e-16", {"fsdp": 16}, ("fsdp",), 2),  # the corners of an open square
        ("v5e-256", {"fsdp": 16, "model": 16}, ("model",), 2),  # a ring
        ("v5e-256", {"fsdp": 256}, ("fsdp",), 4),  # a torus
        ("v5e-256", {"fsdp": 64, "model": 4}, ("model",), 1),  # a quarter of a ring
        ("v5e-128", {"fsdp": 128}, ("fsdp",), 3),  # rings of 16 beside each other
        ("v5p-128", {"fsdp": 16, "model": 4}, ("model",), 2),
        ("v5p-64", {"fsdp": 8, "model": 4}, ("model",), 1),
        ("v4-8", {"fsdp": 4}, ("fsdp",), 2),  # four in a square are a ring
        ("v5e-8", {"data": 4, "model": 2}, ("data",), 1),
        ("v6e-1", {}, (), 1),
    ],
)
def test_the_chip_with_the_fewest_links_counts(
    name: str, sizes: dict[str, int], axes: tuple[str, ...], links: int
) -> None:
    assert wiring(name, **sizes).links(axes) == links


def test_an_open_axis_takes_twice_as_long_as_a_ring() -> None:
    chip = CHIPS["v5e"]
    ring, line = (Sent("model", links, 9e10).seconds(chip) for links in (2, 1))
    assert (ring, line) == (1.0, 2.0)


def test_bytes_are_told_apart_by_the_axes_they_go_along() -> None:
    found = wiring("v5e-16", fsdp=4, model=4).sent(
        [
            Collective("all-gather", 100, 4, 2.0, (0, 4, 8, 12)),
            Collective("all-reduce", 100, 4, 1.0, (0, 1, 2, 3)),
            Collective("all-reduce", 100, 4, 1.0, (0, 1, 2, 3)),
            Collective("collective-permute", 100, 2, 1.0, (2, 3)),
            Collective("all-gather", 10, 16, 1.0, tuple(range(16))),
            Collective("all-reduce", 100, 1, 1.0, (0,)),
        ]
    )
    assert found == (
        Sent("fsdp", 1, 600.0),
        Sent("fsdp,model", 2, 150.0),
        Sent("model", 1, 400.0),
    )


def test_a_compiled_product_sends_along_the_axis_that_splits_it() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    rows = jax.NamedSharding(mesh, jax.P(None, "model"))
    columns = jax.NamedSharding(mesh, jax.P("model", None))
    whole = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((16, 8), np.float32, sharding=columns)
    text = jax.jit(lambda x, w: x @ w, out_shardings=whole).lower(x, w).compile().as_text()
    (sent,) = Wiring(mesh, parse_slice("v5e-8")).sent(Program(text).collectives)
    assert (sent.axes, sent.links, sent.bytes) == ("model", 1, 8 * 8 * 4)


def test_between_the_bounds_products_and_collectives_overlap() -> None:
    chip = CHIPS["v5e"]
    network = [Sent("fsdp", 2, 2 * chip.ici_bandwidth), Sent("model", 1, chip.ici_bandwidth)]
    found = roofline(3 * chip.bf16_flops, 2 * chip.bf16_flops, chip.hbm_bandwidth, network, chip)
    assert found.seconds == {"compute": 3.0, "memory": 1.0, "network": 4.0}
    assert (found.binding, found.step_seconds, found.apart_seconds) == ("network", 4.0, 7.0)
    assert found.middle_seconds == 5.5
    assert (found.mfu, found.apart_mfu) == (0.5, pytest.approx(2 / 7))


def test_the_slowest_resource_sets_the_time() -> None:
    chip = CHIPS["v5e"]
    found = roofline(2 * chip.bf16_flops, chip.bf16_flops, 5 * chip.hbm_bandwidth, [], chip)
    assert (found.binding, found.step_seconds, found.apart_seconds) == ("memory", 5.0, 5.0)
    assert found.mfu == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("kind", "inside", "between"),
    [
        ("all-reduce", 150.0, 25.0),
        ("all-gather", 600.0, 100.0),
        ("reduce-scatter", 75.0, 12.5),
        ("all-to-all", 75.0, 50.0),
        ("collective-permute", 0.0, 100.0),
    ],
)
def test_a_group_over_two_slices_sends_each_byte_out_once(
    kind: str, inside: float, between: float
) -> None:
    one = Collective(kind, 100, 8, 1.0)
    assert one.over_slices(2) == (inside, between)
    assert one.over_slices(1) == (one.wire_bytes, 0.0)


def test_what_leaves_the_slice_goes_at_the_speed_of_the_other_network() -> None:
    devices = np.array(jax.devices()).reshape(2, 4, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    found = Wiring(mesh, parse_slice("v5e-4")).sent(
        [Collective("all-reduce", 100, 8, 1.0, tuple(range(8)))]
    )
    inside, between = 2 * 100 * 3 / 4, 2 * 100 / 4 / 2  # summed on four chips, then sent
    assert found == (Sent("data", 2, inside), Sent("dcn", 0, between))
    out = Collective("all-reduce", 100, 2, 3.0, leaves=True)  # split off by the compiler
    assert Wiring(mesh, parse_slice("v5e-4")).sent([out]) == (Sent("dcn", 0, 300.0),)
    chip = CHIPS["v5e"]
    slow = roofline(1.0, 1.0, 1.0, [Sent("dcn", 0, 2 * chip.dcn_bandwidth)], chip)
    assert (slow.binding, slow.seconds["slices"], slow.seconds["network"]) == ("slices", 2.0, 0)
    assert isinstance(slow, Roofline)
