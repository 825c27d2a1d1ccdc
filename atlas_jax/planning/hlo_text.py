"""Parses optimised HLO text into computations and their instructions."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

_ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ELEMENT = re.compile(r"\), index=(\d+)")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Bytes of the result in HBM, without on-chip memory (space S(1) and up)."""
        return type_bytes(self.type)

    @property
    def size(self) -> int:
        """Bytes of the result in any memory."""
        return type_bytes(self.type, hbm_only=False)

    @property
    def elements(self) -> list[str]:
        """The types of the results: those of a tuple, or the one type."""
        return _elements(self.type) if self.type.startswith("(") else [self.type]

    @property
    def element(self) -> int | None:
        """The number of the element that a `get-tuple-element` takes."""
        found = _ELEMENT.search(self.rest)
        return int(found[1]) if found else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        found = _CALLED.findall(self.rest)
        for names in _CALLED_LIST.findall(self.rest):
            found += re.findall(r"[\w.\-]+", names)
        return found


@dataclasses.dataclass
class Computation:
    """Instructions by name, in their order; `root` is the one that gives the result."""

    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def get(self, name: str) -> Instruction | None:
        """The instruction of this name, if there is one."""
        return self.instructions.get(name)

    def operands(self, one: Instruction) -> list[Instruction]:
        """The instructions whose results `one` uses."""
        return [self.instructions[name] for name in one.operands if name in self.instructions]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.rest.split(")")[0]): i for i in self if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each value, the instructions that use it."""
        found: dict[str, list[Instruction]] = defaultdict(list)
        for one in self:
            for name in dict.fromkeys(one.operands):
                found[name].append(one)
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a program by name, and the name of the one it begins with."""
    computations: dict[str, Computation] = {}
    entry, body = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            body = computations.setdefault(header[2], Computation())
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and (one := _instruction(line)) is not None:
            body.instructions[one.name] = one
            if line.lstrip().startswith("ROOT "):
                body.root = one
    return computations, entry


def type_bytes(type_text: str, hbm_only: bool = True) -> int:
    """Bytes of all arrays in a type; with `hbm_only`, of those in HBM."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(type_text):
        if dtype in _ITEM_BITS and not (hbm_only and re.search(r"S\([1-9]", layout)):
            total += math.prod(int(s) for s in sizes.split(",") if s) * _ITEM_BITS[dtype] // 8
    return total


def _instruction(line: str) -> Instruction | None:
    name, equals, value = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    type_end = _closing(value) + 1 if value.startswith("(") else value.find(" ")
    type_text, call = value[:type_end], value[type_end:].lstrip()
    opcode, bracket, rest = call.partition("(")
    if not bracket:
        return None
    inside = rest[: _closing("(" + rest) - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name.lstrip("%"), type_text, opcode, operands, rest)


def _closing(text: str) -> int:
    """Index of the bracket that closes the first one in `text`."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _elements(tuple_type: str) -> list[str]:
    """`(a, (b, c))` -> `a`, `(b, c)`."""
    found, depth, start = [], 0, 1
    for i, character in enumerate(tuple_type):
        depth += _BRACKETS.get(character, 0)
        if (character == "," and depth == 1) or depth == 0:
            found.append(tuple_type[start:i].strip())
            start = i + 1
    return found
