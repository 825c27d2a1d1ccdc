"""HBM bytes, collectives and FLOPs of a compiled program, from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once. Here each computation counts as often as it
runs. A `conditional` whose branches hold products is the choice between packed and padded passages;
only its branch for True counts, as in `flops`. The trip count of a `while` is found in one of three
places: in its `known_trip_count` (the CPU's compiler writes it, the TPU's does not); in its
condition, which compares a counter with it; or in what the caller gives.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from atlas_jax.planning.hlo_text import Computation, Instruction, parse
from atlas_jax.planning.products import product_flops
from atlas_jax.planning.traffic import continues, kernel_cost, moved

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_PRODUCTS = ("dot", "convolution")
_WINDOWED = "windowed_dot_general_body"
_LOOP_PARTS = re.compile(r"(condition|body)=%?([\w.\-]+)")
_TRUE_BRANCH = re.compile(r"true_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_USED_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")  # a part of an axis has its own size
_GROUPS_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_DEVICE_IDS = re.compile(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x')
_PAIRS = re.compile(r"\{(\d+),(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, and how often a step runs it.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the operand on one chip.
      group: chips that take part together.
      times: runs per step.
      members: numbers of the chips of one group, as the mesh has them in order.
      leaves: whether this is the part of a collective that goes to other slices, which the TPU's
        compiler splits off; `group` is then the number of slices.
    """

    kind: str
    bytes: int
    group: int
    times: float
    members: tuple[int, ...] = ()
    leaves: bool = False

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

    def over_slices(self, slices: int) -> tuple[float, float]:
        """Bytes that one chip sends inside its slice and to the other slices, per run.

        A group over several slices goes in two stages, so that each byte leaves its slice once:
        sums are made inside before they go out, and what comes in is spread inside afterwards.
        """
        if slices == 1:
            return self.wire_bytes, 0.0
        n = max(1, self.group // slices)
        inner, outer = (dataclasses.replace(self, group=size) for size in (n, slices))
        if self.kind == "collective-permute":
            return 0.0, self.wire_bytes
        if self.kind == "all-gather":
            return slices * inner.wire_bytes, outer.wire_bytes
        share = 1 if self.kind == "all-to-all" else n
        return inner.wire_bytes, outer.wire_bytes / share


class Program:
    """A parsed program in optimised HLO text."""

    def __init__(self, text: str, loop_trips: int = 1) -> None:
        """Parse the text; `loop_trips` is for loops whose trip count is not in the text."""
        self.computations, entry = parse(text)
        self._loop_trips = loop_trips
        self._runs: dict[str, float] = defaultdict(float)
        self._fused: set[str] = set()
        self._again: dict[str, float] = defaultdict(float)  # passes of windowed products
        self._count(entry, 1.0)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the program."""
        found = []
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body:
                if one.opcode == "send" and (between := _between_slices(one, body, runs)):
                    found.append(between)
                kind = one.opcode.removesuffix("-start")
                if kind in KINDS and not continues(one, body):
                    if name.startswith("all-reduce-scatter"):  # so the TPU's compiler writes it
                        kind = "reduce-scatter"
                    size = sum(operand.size for operand in body.operands(one))
                    members = _members(one.rest)
                    found.append(Collective(kind, size, len(members), runs, members))
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
        """FLOPs of one chip's products per run; those in a loop count as often as it runs.

        Those of a Pallas kernel are what the kernel says of itself.
        """
        total = 0.0
        for name, runs in self._runs.items():
            body = self.computations[name]
            for one in body:
                if one.opcode in _PRODUCTS:
                    left, right = (operand.type for operand in body.operands(one)[:2])
                    total += runs * product_flops(one.opcode, one.type, left, right, one.rest)
                elif cost := kernel_cost(one):
                    total += runs * cost[0]
        return total

    @property
    def windowed_bytes(self) -> float:
        """Bytes that windowed products read and write after their first pass, per step.

        Instead of gathering a weight, the TPU's compiler may multiply by one shard of it after the
        other, in a loop whose body it calls `windowed_dot_general_body`. Each pass reads and writes
        the whole sum, where a plain product would write it once.
        """
        total = 0.0
        for name, runs in self._again.items():
            body = self.computations[name]
            total += runs * sum(moved(one, body, self.computations) for one in body)
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
                body = dict(_LOOP_PARTS.findall(one.rest)).get("body", "")
                if _WINDOWED in body:
                    self._again[body] += max(0.0, times - runs)
            inside = fused or one.opcode not in ("while", "conditional", "call", "async-start")
            for called in self._branches(one) if one.opcode == "conditional" else one.called:
                if called in self.computations:
                    self._count(called, times, inside)

    def _branches(self, one: Instruction) -> list[str]:
        """The branches of a `conditional` that count; that for True is the last of a list."""
        if not any(self._has_products(name) for name in one.called):
            return one.called
        found = _TRUE_BRANCH.search(one.rest)
        return [found[1]] if found else one.called[-1:]

    def _has_products(self, name: str) -> bool:
        """Whether a computation, or one that it calls, holds a product."""
        return any(
            one.opcode in _PRODUCTS or any(self._has_products(called) for called in one.called)
            for one in self.computations.get(name, ())
        )

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


def _between_slices(one: Instruction, body: Computation, runs: float) -> Collective | None:
    """What a chip sends to other slices through the host, if this is such a transfer."""
    found = _TRANSFER.search(one.rest)
    if found is None:
        return None
    kind = found[1].lower().replace("_", "-")
    listed = _SLICES.search(one.rest)
    slices = len(listed[1].split(",")) if listed else 2
    size = body.operands(one)[0].size
    kind = kind if kind in KINDS else "collective-permute"  # ONE_TO_ONE
    return Collective(kind, size, slices, runs, leaves=True)


def _members(rest: str) -> tuple[int, ...]:
    """The chips of one group of a collective: of the first that is written."""
    if found := _GROUPS_MESH.search(rest):
        return _mesh_members(found)
    if found := _GROUPS_IOTA.search(rest):
        count, size = int(found[1]), int(found[2])
        order = _iota(found[3], found[4])
        return tuple(order.reshape(count, size)[0].tolist())
    if found := _GROUPS_LIST.search(rest):
        return tuple(int(number) for number in found[1].split(","))
    pairs = ((int(a), int(b)) for a, b in _PAIRS.findall(rest))
    return next((pair for pair in pairs if pair[0] != pair[1]), (0,))


def _mesh_members(found: re.Match[str]) -> tuple[int, ...]:
    """Of groups along axes, or parts of axes: `'x'` or `'x':(2)4`, 4 chips in each of 2 parts."""
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(found[1])}
    order = np.arange(math.prod(sizes.values()))
    if listed := _DEVICE_IDS.search(found[0]):
        given = _iota(listed[1], listed[2])
        order = given if given.size == order.size else order
    used = {
        name: (int(before or 1), int(part or sizes[name]))
        for name, before, part in _USED_AXIS.findall(found[2])
    }
    shape: list[int] = []
    taken: list[Any] = []
    for name, size in sizes.items():
        before, part = used.get(name, (size, 1))
        shape += [before, part, size // before // part]
        taken += [0, slice(None), 0]
    return tuple(order.reshape(shape)[tuple(taken)].ravel().tolist())


def _iota(sizes: str, order: str | None) -> Any:
    """`[2,4]T(1,0)`: the numbers from 0 in this shape, with its axes in this order."""
    shape = [int(size) for size in sizes.split(",")]
    counted = np.arange(math.prod(shape)).reshape(shape)
    return counted.transpose([int(axis) for axis in order.split(",")]) if order else counted
