"""Pickles read without executing anything that stands in them.

A pickle is a program. `interpret` runs it on a stack of plain values and knows a handful
of names by heart; whatever else the program asks for is refused, by name. No class is
looked up, no function called, no module imported. `load_plain` is for pickles of plain
lists and dicts alone, where no name at all may occur.
"""

import pickle
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from atlas_jax.core.errors import UserError

_MARK = object()

# What `interpret` gives for a name that the program mentions.
Maker = Callable[..., Any]


class _Name(str):
    """A name that the program mentioned, like `torch.FloatStorage`; inert."""


class Attributes(dict[str, Any]):
    """The attributes of an object whose class was not looked up, such as a Namespace."""


class _Plain(pickle.Unpickler):
    """Only literals, lists, tuples and dicts."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        super().__init__(file)
        self._source = source

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _refusal(self._source, f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError(f"{self._source}: refused: the pickle refers to data outside of it")


def load_plain(file: BinaryIO, source: str) -> Any:
    """Read a pickle of literals, lists, tuples and dicts.

    Raises:
      UserError: it mentions any class or function (which is named), is cut off or is no
        pickle at all.
    """
    try:
        return _Plain(file, source).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{source}: not a whole pickle: {_one_line(error)}") from None


def interpret(
    file: BinaryIO,
    source: str,
    makers: dict[str, Maker],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Run one pickle program on plain values; the file stands behind it afterwards.

    Args:
      makers: name -> what a call of it gives; called with the arguments in the pickle. A
        name whose maker is not called (a mere mention) stays a string.
      persistent: gives the value of a persistent id (a storage of PyTorch).

    Raises:
      UserError: a name that is not in `makers`, an instruction that no checkpoint needs,
        or a program that is cut off.
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
        raise UserError(f"{source}: not a whole pickle: {_one_line(error)}") from None
    raise UserError(f"{source}: not a whole pickle: it does not end")


_LITERALS = frozenset(
    """BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT""".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


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

    def step(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        if name in _LITERALS:
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
        """The instructions that put values together."""
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
            _expect(stack[-1], set).update(values)
        elif name == "SETITEM":
            key, value = self._pop(2)
            _expect(stack[-1], dict)[key] = value
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
            stack.append(self._known(".".join(map(str, self._pop(2)))))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            if not isinstance(function, _Name) or not isinstance(arguments, tuple):
                raise UserError(f"{self._source}: refused: the pickle calls what is no function")
            stack.append(self._makers[function](*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Attributes):
                stack[-1].update(_expect(state, dict))
            else:  # a state dict's own attributes, which say nothing about its arrays
                _expect(stack[-1], dict)
        elif name == "BINPERSID" and self._persistent is not None:
            stack.append(self._persistent(stack.pop()))
        else:
            raise UserError(
                f"{self._source}: refused: the pickle holds the instruction {name}, which no "
                "checkpoint needs"
            )

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


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
