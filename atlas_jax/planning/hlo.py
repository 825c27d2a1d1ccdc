"""HBM bytes, collectives and FLOPs of a compiled program, from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once. Here each computation counts as often as it
runs. The trip count of a `while` is found in one of three places: in its `known_trip_count` (the
CPU's compiler writes it, the TPU's does not); in its condition, which compares a counter with it;
or in what the caller gives.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from atlas_jax.planning.hlo_text import Computation, Instruction, parse
from atlas_jax.planning.products import product_flops
from atlas_jax.planning.traffic import continues, moved

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_LOOP_PARTS = re.compile(r"(condition|body)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_USED_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")  # a part of an axis has its own size
_GROUPS_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, and how often a step runs it.

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
        """Bytes that one chip sends in a ring, per run."""
        g = max(self.group, 1)
        factor = {
            "all-gather": g - 1,
            "all-reduce": 2 * (g - 1) / g,
            "collective-permute": 1.0,
        }.get(self.kind, (g - 1) / g)
        return self.bytes * factor


class Program:
    """A parsed program in optimised HLO text."""

    def __init__(self, text: str, loop_trips: int = 1) -> None:
        """Parse the text; `loop_trips` is for loops whose trip count is not in the text."""
        self.computations, entry = parse(text)
        self._loop_trips = loop_trips
        self._runs: dict[str, float] = defaultdict(float)
        self._fused: set[str] = set()
        self._count(entry, 1.0)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the program."""
        found = []
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body:
                kind = one.opcode.removesuffix("-start")
                if kind in KINDS and not continues(one, body):
                    if name.startswith("all-reduce-scatter"):  # so the TPU's compiler writes it
                        kind = "reduce-scatter"
                    size = sum(operand.size for operand in body.operands(one))
                    found.append(Collective(kind, size, _group(one.rest), runs))
        return found

    @property
    def traffic(self) -> Iterator[tuple[Instruction, int, float]]:
        """Each operation that moves data, the bytes that it reads and writes, and its runs."""
        for name, runs in self._runs.items():
            if name not in self._fused:
                body = self.computations[name]
                for one in body:
                    if size := moved(one, body, self.computations):
                        yield one, size, runs

    @property
    def hbm_bytes(self) -> float:
        """Bytes read and written per step: operands and results of each unfused operation."""
        return sum(size * runs for _, size, runs in self.traffic)

    @property
    def product_flops(self) -> float:
        """FLOPs of one chip's products per run; those in a loop count as often as it runs."""
        total = 0.0
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body:
                if one.opcode in ("dot", "convolution"):
                    left, right = (operand.type for operand in body.operands(one)[:2])
                    total += runs * product_flops(one.opcode, one.type, left, right, one.rest)
        return total

    def _count(self, name: str, runs: float, fused: bool = False) -> None:
        self._runs[name] += runs
        if fused:
            self._fused.add(name)
        for one in self.computations[name]:
            if one.opcode in ("async-update", "async-done"):
                continue
            times = runs
            if one.opcode == "while":
                times *= self._trips(one, self.computations[name])
            inside = fused or one.opcode not in ("while", "conditional", "call", "async-start")
            for called in one.called:
                if called in self.computations:
                    self._count(called, times, inside)

    def _trips(self, loop: Instruction, outside: Computation) -> int:
        """How often the body of a `while` runs."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        parts = dict(_LOOP_PARTS.findall(loop.rest))
        condition, body = (self.computations[parts[part]] for part in ("condition", "body"))
        given = outside.get(loop.operands[0])
        if condition.root is None or body.root is None or given is None:
            return self._loop_trips
        counted = _counted(condition.root, condition, body.root, body, given, outside)
        return self._loop_trips if counted is None else counted


def _counted(
    test: Instruction,
    condition: Computation,
    following: Instruction,
    body: Computation,
    given: Instruction,
    outside: Computation,
) -> int | None:
    """Runs of a loop that adds a constant to a counter up to another constant; else None.

    `test`, `following` and `given` are the values of its condition, its body and its start.
    """
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = condition.get(test.operands[0]), _constant(test.operands[1], condition)
    at = counter.element if counter else None
    if at is None or limit is None or (following.opcode, given.opcode) != ("tuple", "tuple"):
        return None
    start = _constant(given.operands[at], outside)
    added = _source(following.operands[at], body)
    if start is None or added is None or added.opcode != "add":
        return None
    element, step = _source(added.operands[0], body), _constant(added.operands[1], body)
    if not step or step < 0 or element is None or element.element != at:
        return None
    return max(0, math.ceil((limit - start) / step))


def _source(name: str, body: Computation) -> Instruction | None:
    """The instruction that makes a value; copies are followed."""
    one = body.get(name)
    while one is not None and one.opcode == "copy":
        one = body.get(one.operands[0])
    return one


def _constant(name: str, body: Computation) -> int | None:
    """The whole number of a constant in the text."""
    one = _source(name, body)
    number = re.match(r"(-?\d+)\)", one.rest) if one and one.opcode == "constant" else None
    return int(number[1]) if number else None


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
