"""What a setting may be, by its annotation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError

WHOLE, FINITE = "a whole number", "a finite number"
LAYERS = Annotated[int, Meta(ge=1, le=512)]


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "expected"),
    [
        (int, [0, -5, 2**31 - 1, np.int32(3)], [True, 1.0, "1", None], WHOLE),
        (int, [], [2**31, -(2**63), 10**30],
         f"{WHOLE} from -2,147,483,647 to 2,147,483,647"),
        (float, [0, 1.5, -3, np.float32(2)], [math.nan, math.inf, 10**400, "1", True], FINITE),
        (bounds.AtLeast1, [1, 7], [0, -1], f"{WHOLE}, 1 or more"),
        (bounds.Seed, [0, 2**32 - 1], [-1, 2**32], f"{WHOLE} from 0 to 4,294,967,295"),
        (LAYERS, [1, 512], [0, 513, 10**12, "16", 1.0], f"{WHOLE} from 1 to 512"),
        (bounds.BelowOne, [0, 0.99], [1.0, -0.1, math.nan], f"{FINITE}, 0 or more, less than 1"),
        (bounds.Positive, [1e-9], [0, -1.0, math.inf], f"{FINITE}, more than 0"),
        (bool, [True], [1, "True"], "True or False"),
        (str | int, ["a", 1], [1.5, None], f"a text or {WHOLE}"),
        (int | None, [None, 1], ["x"], f"{WHOLE} or None"),
        (Literal["a", "b"], ["a"], ["c", 1, []], "'a' or 'b'"),
        (tuple[LAYERS, ...], [(), (1, 2)], [(1, 0)], f"a tuple, each item {WHOLE} from 1 to 512"),
        (tuple[int, str], [(1, "a")], [(1,)], "2 values"),
        (Sequence[str], [("a",), ["b"]], ["ab"], "a list"),
        (Mapping[str, Any], [{}], [[], None], "a dict"),
        (Callable[[], int], [len, 3], [], ""),
        (Any, [object()], [], ""),
    ],
)  # fmt: skip
def test_annotations_say_what_fits(
    annotation: Any, right: list[Any], wrong: list[Any], expected: str
) -> None:
    assert {bounds.expected(annotation, value) for value in right} <= {""}
    assert {bounds.expected(annotation, value) for value in wrong} <= {expected}
    assert bounds.expected(annotation, bounds.Unknown()) == ""


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: LAYERS = 1
    rate: bounds.BelowOne = 0.0

    def __post_init__(self) -> None:
        bounds.check(self)


def test_a_config_names_the_field_at_fault() -> None:
    assert Shape(layers=3) == Shape(3, 0)
    with pytest.raises(UserError, match=r"^Shape.layers = 1000000000000: expected a whole number "):
        Shape(layers=10**12)
    with pytest.raises(UserError, match=r"^c.json: shape.rate = '0.1': expected a finite number"):
        bounds.check_fields(Shape, {"layers": 2, "rate": "0.1"}, "c.json: shape")
    with pytest.raises(UserError, match=r"^c.json has the unknown field width;"):
        bounds.check_fields(Shape, {"width": 2}, "c.json")
    with pytest.raises(UserError, match=r"layers = a huge number: "):
        Shape(layers=10**4000)
