"""What a compiled program moves and computes, from its optimised HLO text.

HBM bytes, collectives and the FLOPs of its products.

XLA's own cost analysis counts the body of a loop once. Here each computation counts as often
as it runs: the trip count of a `while` is in its `known_trip_count` (the CPU's compiler writes
it, the TPU's does not), or what its condition compares a counter with, or is given.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from atlas_jax.planning.products import product_flops

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

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
_LOOP_PARTS = re.compile(r"(condition|body)=%?([\w.\-]+)")
_ELEMENT = re.compile(r"\), index=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_USED_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")  # a part of an axis has its own size
_GROUPS_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
# Names for values or control that move nothing by themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier async-start async-update async-done copy-done "
    "all-gather-done all-reduce-done collective-permute-done send-done recv-done iota".split()
)


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
        """Size of what it gives, in HBM; on-chip memory (space S(1) and up) is left out."""
        return _bytes(self.type)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, with how often a step runs it.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the operand on one chip.
      group: chips that take part together.
      times: runs per step.
    """

    kind: str
    bytes: int
    group: int
    times: float

    @property
    def wire_bytes(self) -> float:
        """What one chip sends in a ring, per run."""
        g = max(self.group, 1)
        factor = {
            "all-gather": g - 1,
            "all-reduce": 2 * (g - 1) / g,
            "collective-permute": 1.0,
        }.get(self.kind, (g - 1) / g)
        return self.bytes * factor


class Program:
    """Optimised HLO text, taken apart."""

    def __init__(self, text: str, loop_trips: int = 1) -> None:
        """Parse; `loop_trips` is for loops whose trip count the text does not say."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        self._entry = ""
        self._parse(text)
        self._loop_trips = loop_trips
        self._runs: dict[str, float] = defaultdict(float)
        self._fused: set[str] = set()
        self._count(self._entry, 1.0)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the program."""
        found = []
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body.values():
                kind = one.opcode.removesuffix("-start")
                if kind in KINDS:
                    size = sum(_bytes(body[o].type, False) for o in one.operands if o in body)
                    found.append(Collective(kind, size, _group(one.rest), runs))
        return found

    @property
    def hbm_bytes(self) -> float:
        """Bytes read and written per step: operands and results of each unfused operation."""
        total = 0.0
        for name, runs in self._runs.items():
            if name not in self._fused:
                body = self.computations[name]
                total += runs * sum(self._moved(one, body) for one in body.values())
        return total

    @property
    def product_flops(self) -> float:
        """FLOPs of one chip's products per run, each as often as its loops run."""
        total = 0.0
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body.values():
                if one.opcode in ("dot", "convolution"):
                    left, right = (body[operand].type for operand in one.operands[:2])
                    total += runs * product_flops(one.opcode, one.type, left, right, one.rest)
        return total

    def _parse(self, text: str) -> None:
        name, body = "", None
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header[2]
                body = self.computations.setdefault(name, {})
                if header[1]:
                    self._entry = header[2]
            elif line.startswith("}"):
                body = None
            elif body is not None and (one := _instruction(line)) is not None:
                body[one.name] = one
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = one

    def _count(self, name: str, runs: float, fused: bool = False) -> None:
        self._runs[name] += runs
        if fused:
            self._fused.add(name)
        for one in self.computations[name].values():
            if one.opcode in ("async-update", "async-done"):
                continue
            times = runs
            if one.opcode == "while":
                times *= self._trips(one, self.computations[name])
            inside = fused or one.opcode not in ("while", "conditional", "call", "async-start")
            for called in _called(one.rest):
                if called in self.computations:
                    self._count(called, times, inside)

    def _trips(self, loop: Instruction, outside: dict[str, Instruction]) -> int:
        """How often the body of a `while` runs."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        parts = dict(_LOOP_PARTS.findall(loop.rest))
        test, following = (self._roots.get(parts.get(part, "")) for part in ("condition", "body"))
        given = outside.get(loop.operands[0])
        if test is None or following is None or given is None:
            return self._loop_trips
        condition, body = (self.computations[parts[part]] for part in ("condition", "body"))
        counted = _counted(test, condition, following, body, given, outside)
        return self._loop_trips if counted is None else counted

    def _moved(self, one: Instruction, body: dict[str, Instruction]) -> float:
        if one.opcode in _FREE:
            return 0.0
        operands = [body[name] for name in one.operands if name in body]
        if one.opcode in ("dynamic-slice", "gather"):  # reads what it gives, not all it is given
            return 2 * one.bytes
        if one.opcode == "dynamic-update-slice":  # in place
            return 2 * operands[1].bytes if len(operands) > 1 else 0.0
        if one.opcode == "fusion":
            called = next(iter(_called(one.rest)), "")
            if called in self.computations:
                return self._fusion_moved(one, operands, self.computations[called])
        return one.bytes + sum(operand.bytes for operand in operands)

    def _fusion_moved(
        self, one: Instruction, operands: list[Instruction], inner: dict[str, Instruction]
    ) -> float:
        """As `_moved`; parameters that are only sliced count their slices."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in inner.values():
            for name in instruction.operands:
                users[name].append(instruction)
        parameters = {i.rest.split(")")[0]: i for i in inner.values() if i.opcode == "parameter"}
        updates = [i for i in inner.values() if i.opcode == "dynamic-update-slice"]
        total = 0.0
        for number, operand in enumerate(operands):
            parameter = parameters.get(str(number))
            uses = _uses(parameter.name, users) if parameter else []
            if uses and all(u.opcode in ("dynamic-slice", "gather") for u in uses):
                total += min(operand.bytes, sum(_bytes(u.type, False) for u in uses))
            elif uses and all(u.opcode == "dynamic-update-slice" for u in uses):
                continue  # written in place: counted with the result
            else:
                total += operand.bytes
        if updates and one.bytes:
            slices = [inner[u.operands[1]] for u in updates if u.operands[1] in inner]
            return total + min(one.bytes, sum(_bytes(s.type, False) for s in slices))
        return total + one.bytes


def _counted(
    test: Instruction,
    condition: dict[str, Instruction],
    following: Instruction,
    body: dict[str, Instruction],
    given: Instruction,
    outside: dict[str, Instruction],
) -> int | None:
    """Runs of a loop that adds a constant to a counter while it is less than another; else None.

    `test`, `following` and `given` are what its condition, its body and its start give.
    """
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = condition.get(test.operands[0]), _constant(test.operands[1], condition)
    at = _ELEMENT.search(counter.rest) if counter else None
    if at is None or limit is None or (following.opcode, given.opcode) != ("tuple", "tuple"):
        return None
    start = _constant(given.operands[int(at[1])], outside)
    added = _source(following.operands[int(at[1])], body)
    if start is None or added is None or added.opcode != "add":
        return None
    element, step = _source(added.operands[0], body), _constant(added.operands[1], body)
    if not step or step < 0 or element is None or _ELEMENT.findall(element.rest) != [at[1]]:
        return None
    return max(0, math.ceil((limit - start) / step))


def _source(name: str, body: dict[str, Instruction]) -> Instruction | None:
    """The instruction that makes a value, through copies."""
    one = body.get(name)
    while one is not None and one.opcode == "copy":
        one = body.get(one.operands[0])
    return one


def _constant(name: str, body: dict[str, Instruction]) -> int | None:
    """A whole number that stands in the text."""
    one = _source(name, body)
    number = re.match(r"(-?\d+)\)", one.rest) if one and one.opcode == "constant" else None
    return int(number[1]) if number else None


def _uses(name: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
    """The instructions that read a value, through bitcasts."""
    found = []
    for user in users[name]:
        found += _uses(user.name, users) if user.opcode == "bitcast" else [user]
    return found


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
    """Index of the bracket that closes the one `text` begins with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _CALLED_LIST.findall(rest):
        yield from re.findall(r"[\w.\-]+", names)


def _bytes(type_text: str, hbm_only: bool = True) -> int:
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(type_text):
        if dtype in _ITEM_BITS and not (hbm_only and re.search(r"S\([1-9]", layout)):
            total += math.prod(int(s) for s in sizes.split(",") if s) * _ITEM_BITS[dtype] // 8
    return total


def _group(rest: str) -> int:
    if found := _GROUPS_MESH.search(rest):
        sizes = dict(_MESH_AXIS.findall(found[1]))
        used = _USED_AXIS.findall(found[2])
        return math.prod(int(part or sizes[name]) for name, part in used)
    if found := _GROUPS_IOTA.search(rest):
        return int(found[1])
    if found := _GROUPS_LIST.search(rest):
        return len(found[1].split(","))
    return 2 if "source_target_pairs" in rest else 1
