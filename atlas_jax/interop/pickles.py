"""Read pickles without executing anything in them.

A pickle is a program. `interpret` runs it on a stack of plain values and knows a few names; a
program that asks for any other name is refused. No class is looked up, no function called, no
module imported. `load_plain` is for pickles of only plain lists and dicts, in which no name may
occur. They are long, so Python's own unpickler reads them, after a scan has checked that they do
not ask for more memory than they need.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from atlas_jax.core.errors import UserError, one_line

_MARK = object()
_BITS = 128  # largest number; no checkpoint has one of this size
_GIVEN = 1_000_000  # most values in the arguments of calls; a tensor has about ten
_DEPTH = 100  # most levels of nested lists
_VALUES = 10_000_000  # most values of a checkpoint; a shared list counts at each place

# Value of `interpret` for a name that the program mentions.
Maker = Callable[..., Any]


class _Name(str):
    """A name that the program mentioned, like `torch.FloatStorage`; inert."""


class Attributes(dict[str, Any]):
    """The attributes of an object whose class was not looked up, such as a Namespace."""


class _Plain(pickle.Unpickler):
    """Only literals, lists and dicts."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        super().__init__(file)
        self._source = source

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _refusal(self._source, f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError(f"{self._source}: refused: the pickle refers to data outside of it")


def load_plain(file: BinaryIO, source: str) -> Any:
    """Read a pickle of literals, lists and dicts.

    Raises:
      UserError: it mentions a class or function (which is named), holds other objects, asks for
        too much memory, is cut off, or is not a pickle.
    """
    program = file.read()
    try:
        _scan(program, source)
        return _Plain(io.BytesIO(program), source).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise almost any error
        raise UserError(f"{source}: not a whole pickle: {one_line(error)}") from None


def interpret(
    file: BinaryIO,
    source: str,
    makers: dict[str, Maker],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Run one pickle program on plain values; afterwards the file is at its end.

    Args:
      makers: name -> function that makes the result of a call, from the arguments in the
        pickle. A name that is only mentioned stays a string.
      persistent: gives the value of a persistent id (a storage of PyTorch).

    Raises:
      UserError: a name is not in `makers`, or an instruction is not needed by any checkpoint, or
        the program is cut off.
    """
    machine = _Machine(source, makers, persistent)
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "STOP":
                return machine.stack.pop()
            machine.step(code.name, argument)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: not a whole pickle: {one_line(error)}") from None
    raise UserError(f"{source}: not a whole pickle: it does not end")


_LITERALS = frozenset(
    """BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT""".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


_MEMO = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
# Instructions for plain values, and those that `_Plain` itself refuses. No tuples: as keys of a
# dict, a few nested ones take for ever to hash.
_IN_PLAIN = (_LITERALS - {"LONG4"}) | set(_CONSTANTS) | _MEMO | frozenset(
    """GET BINGET LONG_BINGET MARK EMPTY_DICT EMPTY_LIST DICT LIST APPEND APPENDS SETITEM
    SETITEMS POP PROTO FRAME STOP""".split()
)  # fmt: skip
_REFUSES = frozenset(("GLOBAL", "STACK_GLOBAL", "INST", "PERSID", "BINPERSID"))
_CODES = {ord(op.code): op for op in pickletools.opcodes}
_ARGUMENT = {code: op.arg.n if op.arg else 0 for code, op in _CODES.items() if op.name in _IN_PLAIN}
_LENGTHS = {  # bytes that say how long an argument is
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUTS = frozenset(code for code, op in _CODES.items() if op.name in _MEMO)
_PUT, _LONG_BINPUT, _STOP = ord("p"), ord("r"), ord(".")


def _scan(program: bytes, source: str) -> None:
    """Check a plain pickle before Python's unpickler reads it.

    The unpickler allocates as many entries as the largest index of its memo. A writer of pickles
    counts these indices one by one.

    Raises:
      UserError: an instruction is not needed for plain values, or an index is out of order.
      IndexError, ValueError: it is cut off.
    """
    at = puts = 0
    while True:
        code = program[at]
        size = _ARGUMENT.get(code)
        if size is None:
            if code not in _CODES:
                raise ValueError(f"at position {at}, opcode {program[at : at + 1]!r} unknown")
            if _CODES[code].name in _REFUSES:
                return
            raise _instruction(source, _CODES[code].name)
        start = at = at + 1
        if size > 0:
            at += size
        elif size == pickletools.UP_TO_NEWLINE:
            at = program.index(b"\n", at) + 1
        elif size < 0:
            width = _LENGTHS[size]
            at += width + int.from_bytes(program[at : at + width], "little")
        if at > len(program):
            raise ValueError("cut off")
        if code in _PUTS:
            index = puts
            if code == _PUT:
                index = int(program[start:at])
            elif code == _LONG_BINPUT:
                index = int.from_bytes(program[start:at], "little")
            puts += 1
            if index > puts:  # old writers count from 1
                raise UserError(
                    f"{source}: refused: value {puts} of the pickle is to be remembered as number "
                    f"{index}, which would take as much memory as all numbers before"
                )
        elif code == _STOP:
            return


class _Machine:
    """The stack and the memo of one program."""

    def __init__(
        self, source: str, makers: dict[str, Maker], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.stack: list[Any] = []
        self._source = source
        self._makers = makers
        self._persistent = persistent
        self._memo: dict[int, Any] = {}
        self._given = 0  # number of values in the arguments of calls so far

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > _BITS:
                raise ValueError(f"a number of {argument.bit_length()} bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        """The instructions that build values."""
        stack = self.stack
        if name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_SET":
            stack.append(set())
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "DICT":
            stack.append(_pairs(self._marked()))
        elif name == "APPEND":
            value = stack.pop()
            _expect(stack[-1], list).append(value)
        elif name == "APPENDS":
            values = self._marked()
            _expect(stack[-1], list).extend(values)
        elif name == "ADDITEMS":
            values = self._marked()
            _expect(stack[-1], set).update(map(plain_key, values))
        elif name == "SETITEM":
            key, value = self._pop(2)
            _expect(stack[-1], dict)[plain_key(key)] = value
        elif name == "SETITEMS":
            values = self._marked()
            _expect(stack[-1], dict).update(_pairs(values))
        else:
            self._name(name, argument)

    def _name(self, name: str, argument: Any) -> None:
        """The instructions that mention or use names."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(self._known(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._known(".".join(_expect(part, str) for part in self._pop(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            if not isinstance(function, _Name) or not isinstance(arguments, tuple):
                raise UserError(f"{self._source}: refused: the pickle calls what is no function")
            self._given += sum(
                len(a) for a in arguments if isinstance(a, list | tuple | dict | str)
            )
            if self._given > _GIVEN:
                raise ValueError("its calls are given more values than any checkpoint has")
            stack.append(self._makers[function](*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Attributes):
                stack[-1].update(_expect(state, dict))
            else:  # attributes of a state dict, not of its arrays
                _expect(stack[-1], dict)
        elif name == "BINPERSID" and self._persistent is not None:
            stack.append(self._persistent(stack.pop()))
        else:
            raise _instruction(self._source, name)

    def _known(self, name: str) -> _Name:
        if name not in self._makers:
            raise _refusal(self._source, name)
        return _Name(name)

    def _pop(self, count: int) -> list[Any]:
        if count == 0:
            return []
        if len(self.stack) < count or any(value is _MARK for value in self.stack[-count:]):
            raise ValueError("the stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise ValueError("no mark on the stack")


def walked(tree: Any, source: str, leaf: Callable[[Any, str], Any]) -> Any:
    """Copy a tree of dicts, lists and tuples, with `leaf(value, path)` for each other value.

    Shared parts are visited once, and are shared in the result.

    Raises:
      UserError: names a place that contains itself, is too deep, or has too many values because
        its lists are shared again and again.
    """
    done: dict[int, tuple[Any, int] | None] = {}

    def visit(value: Any, way: str, depth: int) -> tuple[Any, int]:
        if not isinstance(value, dict | list | tuple):
            return leaf(value, way), 1
        known = done.setdefault(id(value), None)
        if known is not None:
            return known
        if depth > _DEPTH:
            raise UserError(f"{source}: {way[:200]}: lies in more than {_DEPTH} lists or dicts")
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        found, count = [], 1
        for key, item in pairs:
            place = f"{way}.{key}" if way else str(key)
            if done.get(id(item), ()) is None:
                raise UserError(f"{source}: {place[:200]}: holds itself")
            new, values = visit(item, place, depth + 1)
            found.append(new)
            count += values
            if count > _VALUES:
                raise UserError(f"{source}: {place[:200]}: stands for more than {_VALUES} values")
        result: Any = tuple(found) if isinstance(value, tuple) else found
        if isinstance(value, dict):
            result = dict(zip(value, found, strict=True))
        done[id(value)] = result, count
        return result, count

    return visit(tree, "", 0)[0]


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(plain_key, values[::2]), values[1::2], strict=True))


def plain_key(value: Any) -> Any:
    """The value, if it is quickly hashed and printed; nested tuples are not.

    Raises:
      ValueError: the value is of another kind.
    """
    if not isinstance(value, str | bytes | int | float | None):
        raise ValueError(f"a {type(value).__name__} where a text or number belongs")
    return value


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _refusal(source: str, name: str) -> UserError:
    return UserError(
        f"{source}: refused: the pickle asks for {name}, which no checkpoint of weights needs. "
        "Nothing in it was executed. Load it only where you trust its author, with the program "
        "that wrote it, and save the weights as safetensors"
    )


def _instruction(source: str, name: str) -> UserError:
    return UserError(
        f"{source}: refused: the pickle holds the instruction {name}, which no checkpoint needs"
    )
