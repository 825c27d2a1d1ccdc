"""Bytes of HBM that one operation of a compiled program reads and writes.

An operation reads its operands and writes its result. If it takes or writes only a slice of a
value, only the slice counts. XLA passes such values to a fusion as a whole: all layers of a scan go
in, but one is read; the gradients of all layers go in and out, but one is written. So the inside of
a fusion is examined, and the fusions inside it.

What a Pallas kernel does is hidden from the compiler. The kernel says itself how many bytes its
blocks move and how many FLOPs its products have (`CostEstimate`).
"""

import math
import re

from atlas_jax.planning.hlo_text import Computation, Instruction, type_bytes

# Operations that only name values or control the flow; they move nothing.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier async-start async-update iota".split()
)
# The TPU compiler's calls that only name one buffer or several adjacent ones.
_FREE_CALLS = frozenset(("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast"))
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"')
_SLICES = frozenset(("dynamic-slice", "gather", "slice"))  # they read as much as they give
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write this operand into the first, in place


def moved(one: Instruction, body: Computation, computations: dict[str, Computation]) -> int:
    """Bytes read and written by an operation of `body` outside of fusions."""
    if one.opcode in _FREE or one.opcode.endswith("-done") or target(one) in _FREE_CALLS:
        return 0
    operands = body.operands(one)
    if cost := kernel_cost(one):
        on_chip = sum(value.size - value.bytes for value in (one, *operands))
        return max(0, cost[1] - on_chip)
    if one.opcode in _SLICES and operands:
        return one.bytes + (one.size if operands[0].bytes else 0)
    if one.opcode in _UPDATES and len(operands) > _UPDATES[one.opcode]:
        update = operands[_UPDATES[one.opcode]]
        return update.bytes + (update.size if one.bytes else 0)
    if one.opcode.endswith("-start") and one.type.startswith("("):
        return _start_moved(one, operands)
    if one.opcode == "fusion":
        called = computations.get(next(iter(one.called), ""))
        if called is not None and called.root is not None:
            return _fusion_moved(one, operands, called, computations)
    return one.bytes + sum(operand.bytes for operand in operands)


def target(one: Instruction) -> str:
    """The target of a custom call; empty for other operations."""
    found = _TARGET.search(one.rest) if one.opcode == "custom-call" else None
    return found[1] if found else ""


def kernel_cost(one: Instruction) -> tuple[int, int] | None:
    """FLOPs and bytes that a Pallas kernel says of itself; None for other operations."""
    found = _COST.search(one.rest) if one.opcode == "custom-call" else None
    return (int(found[1]), int(found[2])) if found else None


def continues(one: Instruction, body: Computation) -> bool:
    """Whether a collective inside a fusion continues one that began in an earlier fusion.

    The TPU's compiler puts an asynchronous collective into three or more fusions with the same
    `chain_id`: one starts it, one or more products run beside it, and one waits for it.
    """
    starts = (target(user) == "AsyncCollectiveStart" for user in body.users[one.name])
    return "chain_id=" in one.rest and not any(starts)


def _start_moved(one: Instruction, operands: list[Instruction]) -> int:
    """Bytes moved by a `-start`, until its `-done`; its result is (operand, result, marks)."""
    first, second = one.elements[:2]
    if one.opcode == "copy-start":  # (result, operand, mark)
        return type_bytes(first) + sum(operand.bytes for operand in operands)
    if "slice" in one.opcode:
        size = type_bytes(second, hbm_only=False)
        return type_bytes(second) + (size if type_bytes(first) else 0)
    if one.opcode == "all-reduce-start":  # (result, result)
        return one.bytes + sum(operand.bytes for operand in operands)
    return one.bytes


def _fusion_moved(
    one: Instruction,
    operands: list[Instruction],
    inner: Computation,
    computations: dict[str, Computation],
) -> int:
    assert inner.root is not None
    if target(inner.root) == "AsyncCollectiveStart":
        return one.bytes  # the bytes it sends and the bytes it receives
    total = 0
    for number, operand in enumerate(operands):
        if operand.bytes and number in inner.parameters:
            read = _read(inner.parameters[number], inner, computations)
            total += round(min(operand.bytes, read))
    for number, element in enumerate(one.elements):
        if size := type_bytes(element):
            total += round(min(size, _written(inner.root, number, inner, computations)))
    return total


def _read(one: Instruction, body: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that a fusion reads of a value; infinite means all of it."""
    total = 0.0
    for user in body.users[one.name]:
        places = [i for i, name in enumerate(user.operands) if name == one.name]
        if user.opcode == "bitcast":
            total += _read(user, body, computations)
        elif user.opcode in _SLICES and places == [0]:
            total += user.size
        elif user.opcode in _UPDATES and places == [0] and _in_place(user, body):
            continue
        elif user.opcode == "fusion":
            called = computations[user.called[0]]
            total += sum(_read(called.parameters[i], called, computations) for i in places)
        elif user.opcode == "tuple" or _awaits(user, body):
            continue  # only passed on
        else:
            return math.inf
    return total


def _written(
    root: Instruction, number: int, body: Computation, computations: dict[str, Computation]
) -> float:
    """Bytes written of a fusion's result `number`; infinite means all of it."""
    one = body.operands(root)[number] if root.opcode == "tuple" else root
    one = _behind_bitcasts(one, body)
    if one.opcode == "get-tuple-element":
        number, one = one.element or 0, body.operands(one)[0]
    if one.opcode == "fusion":
        called = computations[one.called[0]]
        assert called.root is not None
        return _written(called.root, number, called, computations)
    if one.opcode in _UPDATES and _in_place(one, body):
        return body.operands(one)[_UPDATES[one.opcode]].size
    if one.opcode == "parameter" or _awaits(one, body):
        return 0
    return math.inf


def _in_place(update: Instruction, body: Computation) -> bool:
    """Whether a fusion updates a slice of an operand and returns the whole operand."""
    whole = _behind_bitcasts(body.operands(update)[0], body)
    return whole.opcode == "parameter" and _is_given(update, body)


def _is_given(one: Instruction, body: Computation) -> bool:
    """Whether a value is used only as a result of its computation, apart from bitcasts."""
    return all(
        user.opcode == "tuple" or (user.opcode == "bitcast" and _is_given(user, body))
        for user in body.users[one.name]
    )


def _awaits(one: Instruction, body: Computation) -> bool:
    """Whether this continues or ends a collective, which was counted where it began."""
    return target(one) == "AsyncCollectiveDone" or continues(one, body)


def _behind_bitcasts(one: Instruction, body: Computation) -> Instruction:
    while one.opcode == "bitcast":
        one = body.operands(one)[0]
    return one
