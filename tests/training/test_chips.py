"""Slices as users name them, and as the compiler does."""

import math

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.training.chips import CHIPS, parse_slice, peak_flops


@pytest.mark.parametrize(
    ("name", "chips", "topology"),
    [
        ("v4-8", 4, "v4:2x2x1"),
        ("v4-128", 64, "v4:4x4x4"),
        ("v5e-256", 256, "v5e:16x16"),
        ("v5litepod-8", 8, "v5e:2x4"),
        ("v5p-64", 32, "v5p:2x4x4"),
        ("v6e-32", 32, "v6e:4x8"),
    ],
)
def test_v4_and_v5p_count_cores_and_the_others_chips(name: str, chips: int, topology: str) -> None:
    found = parse_slice(name)
    assert (found.chips, found.topology) == (chips, topology)


def test_every_shape_has_as_many_chips_as_it_says() -> None:
    for chip in CHIPS.values():
        for chips, shape in chip.shapes.items():
            assert math.prod(map(int, shape.split("x"))) == chips


@pytest.mark.parametrize(
    ("name", "said"),
    [("v9-8", "expected one of v4, v5e, v5p, v6e"), ("v5e", "v5e-256"), ("v5p-6", "TensorCores")],
)
def test_a_slice_that_is_not_on_offer_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_slice(name)


def test_a_chip_is_known_by_the_name_jax_gives_it() -> None:
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].bf16_flops
    assert peak_flops("TPU v5p") == CHIPS["v5p"].bf16_flops
    assert peak_flops("cpu") == 0.0
