"""FLOPs of one product of optimised HLO, from its line and the types of its operands."""

import math
import re

import numpy as np

_SIZES = re.compile(r"\w+\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUPS = re.compile(r"(feature|batch)_group_count=(\d+)")


def product_flops(opcode: str, result: str, left: str, right: str, attributes: str) -> float:
    """Two for each multiplication of a `dot` or `convolution`; 0 for any other instruction.

    A TPU computes most products as convolutions, and batched products as dilated convolutions that
    are mostly padding. Multiplications with padding do not count.

    Args:
      opcode: of the instruction.
      result: its type, such as `bf16[8,128]{1,0}`; `left` and `right`: those of its operands.
      attributes: the rest of its line.
    """
    if opcode == "dot":
        contracted = _CONTRACTED.search(attributes)
        sizes, axes = _sizes(left), _numbers(contracted[1] if contracted else "")
        return 2.0 * math.prod(_sizes(result)) * math.prod(sizes[axis] for axis in axes)
    labels = _LABELS.search(attributes)
    if opcode != "convolution" or labels is None:
        return 0.0
    given = dict(zip(labels[1], _sizes(left), strict=True))
    kernel = dict(zip(labels[2], _sizes(right), strict=True))
    made = dict(zip(labels[3], _sizes(result), strict=True))
    window = _window(attributes)
    positions = 1
    for axis in (label for label in labels[1] if label.isdigit()):
        positions *= _positions(given[axis], kernel[axis], made[axis], int(axis), window)
    groups = {name: int(count) for name, count in _GROUPS.findall(attributes)}
    features = given["f"] // groups.get("feature", 1)
    return 2.0 * features * made["f"] * (given["b"] // groups.get("batch", 1)) * positions


def _positions(given: int, kernel: int, made: int, axis: int, window: dict[str, list[str]]) -> int:
    """Number of pairs of kernel and result positions on an axis that do not meet padding."""

    def of(name: str, usual: str) -> str:
        return window[name][axis] if name in window else usual

    low = int(of("pad", "0_0").partition("_")[0])
    starts = np.arange(made) * int(of("stride", "1")) - low
    steps = np.arange(kernel) * int(of("rhs_dilate", "1"))
    at = starts[:, None] + steps
    spread = int(of("lhs_dilate", "1"))
    return int(((at % spread == 0) & (at >= 0) & (at < given * spread)).sum())


def _window(attributes: str) -> dict[str, list[str]]:
    """`size=3x3 pad=1_1x1_1` as name -> a text for each spatial axis."""
    found = _WINDOW.search(attributes)
    pairs = (part.partition("=") for part in found[1].split()) if found else ()
    # A minus sign may stand before a number, an x only between two.
    return {name: values.split("x") for name, _, values in pairs}


def _sizes(type_text: str) -> list[int]:
    found = _SIZES.search(type_text)
    return _numbers(found[1] if found else "")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
