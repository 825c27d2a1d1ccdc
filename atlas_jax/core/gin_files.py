"""Reading gin files strictly: every name is checked before anything is bound.

With `parse_config`, gin-config itself accepts a missing ``%gin.REQUIRED`` or an undefined macro
without an error, and says "No configurable matching" without the nearest name. Here files and
command-line bindings are first read into plain `Binding`s with the place of each. Then all are
checked together. Only then gin gets them.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError, nearest, one_line
from atlas_jax.core.paths import check_name, kind_of, read_text, text_problem
from atlas_jax.core.terminal import expand_home

# The only scopes the program opens: one configurable, two settings (reader/OptimizerConfig...).
SCOPES = ("reader", "retriever", "encoder")

_BINDING_NAME = re.compile(r"(?:\w+/)*[A-Za-z_]\w*(?:\.\w+)*")
# A value that gin cannot parse is used as a string if it looks like a path, a name or a schedule.
# With quotes or brackets it is more likely a typing error.
_BARE_STRING = re.compile(r"[^\s'\"(){}\[\]@%#][^'\"(){}\[\]#\n]*")
_BARE_WORD = re.compile(r"Failed to parse token '(\w+)'")  # as gin words it
_LARGEST = (1 << 63) - 1
_LONGEST_VALUE = 1 << 16
_DEEPEST_VALUE = 20  # levels of nested lists
_DEEPEST_INCLUDE = 32
# Errors of gin's parser other than syntax errors: numbers too long, null bytes, ...
_PARSER_ERRORS = (ValueError, TypeError, OverflowError, AttributeError, IndexError, StopIteration)
_PYTHON_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


@dataclasses.dataclass(frozen=True)
class Binding:
    """One ``scope/Name.parameter = value``; a macro has the parameter ''. `place`: its origin."""

    scope: str
    name: str
    parameter: str
    value: Any
    place: str

    @property
    def label(self) -> str:
        """The binding as in a gin file, without the value."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.name}.{self.parameter}" if self.parameter else f"{scope}{self.name}"


@dataclasses.dataclass
class Bindings:
    """The bindings of files and command line; the last binding of a name counts."""

    bindings: dict[str, Binding] = dataclasses.field(default_factory=dict)
    imports: list[str] = dataclasses.field(default_factory=list)
    read: set[Path] = dataclasses.field(default_factory=set)

    def add(self, binding: Binding) -> None:
        """Add a binding after checking its names and its value.

        Raises:
          UserError: unknown scope, configurable or parameter (names the nearest one); a value
            that no program can hold; or a `~name` without such a user.
        """
        problem = _impossible(binding.value)
        if problem:
            raise UserError(f"{binding.place}: {binding.label}: {problem}")
        if binding.parameter:
            binding = _checked(binding)
        binding = dataclasses.replace(binding, value=expand_home(binding.value, binding.place))
        self.bindings[binding.label] = binding

    def macro(self, name: str) -> Binding | None:
        """The binding of the macro `name`, if there is one."""
        return self.bindings.get(name)

    def fill_required(self, values: Mapping[str, Any]) -> None:
        """Give these macros a value if they are still ``%gin.REQUIRED``."""
        for name, value in values.items():
            binding = self.bindings.get(name)
            if binding is not None and any(map(_is_required, _references(binding.value))):
                self.bindings[name] = dataclasses.replace(binding, value=value)

    def apply(self) -> None:
        """Pass all bindings to gin and lock it."""
        for module in self.imports:
            gin.parse_config(f"import {module}")  # so that gin.config_str() repeats it
        for binding in self.bindings.values():
            if binding.parameter:
                key = (binding.scope, binding.name, binding.parameter)
            else:
                key = (binding.label, "gin.macro", "value")
            gin.bind_parameter(key, binding.value)
        gin.finalize()


def _configurable(name: str, place: str) -> Any:
    """The registered configurable called `name`, which may begin with modules."""
    registry = gin_config._REGISTRY
    matches = registry.matching_selectors(name)
    if not matches:
        own = [c.name for selector, c in registry.items() if not selector.startswith("gin.")]
        raise UserError(f"{place}: no configurable is called {name}{nearest(name, own)}")
    if len(matches) > 1:
        raise UserError(f"{place}: {name} is ambiguous, write one of: {', '.join(sorted(matches))}")
    return registry[matches[0]]


def _checked(binding: Binding) -> Binding:
    """Check scope and parameter; return `binding` with its configurable's shortest name."""
    if binding.scope and binding.scope not in SCOPES:
        raise UserError(
            f"{binding.place}: {binding.label}: no part of the program uses the scope "
            f"{binding.scope}{nearest(binding.scope, SCOPES)}"
        )
    configurable = _configurable(binding.name, binding.place)
    parameters = list(inspect.signature(configurable.wrapped).parameters)
    if binding.parameter not in parameters:
        raise UserError(
            f"{binding.place}: {binding.name} has no parameter {binding.parameter}"
            f"{nearest(binding.parameter, parameters)}"
        )
    name = gin_config._REGISTRY.minimal_selector(configurable.selector)
    return Binding(binding.scope, name, binding.parameter, binding.value, binding.place)


class _Delegate(gin_config.ParserDelegate):
    """Gin's own delegate, with our message for an unknown ``@reference``."""

    def __init__(self, place: Callable[[], str]) -> None:
        super().__init__()
        self.place = place

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        *_, name = scoped_selector.split("/")
        _configurable(name, self.place())
        return super().configurable_reference(scoped_selector, evaluate)


def _impossible(value: Any) -> str:
    """The fault of a value that no setting can have; '' if there is none."""
    level = [value]
    for _ in range(_DEEPEST_VALUE):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str) and (problem := text_problem(item)):
                return f"{ascii(item)} holds {problem}"
            if isinstance(item, int) and not -_LARGEST <= item <= _LARGEST:
                return f"a number of {item.bit_length()} bits; whole numbers have 63 at most"
            if isinstance(item, float) and not math.isfinite(item):
                return f"{item}: a finite number is needed"
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                below += item
        if not below:
            return ""
        level = below
    return f"lists lie in each other more than {_DEEPEST_VALUE} deep"


def find_file(name: str, search_paths: Sequence[Path], asked_by: str) -> Path:
    """The first of `search_paths` that holds the gin file `name`.

    Raises:
      UserError: no folder holds it; lists the search paths and the nearest file name.
    """
    try:
        check_name(name)
    except UserError as error:
        raise UserError(f"{asked_by}: there is no such gin file: {error}") from None
    for folder in search_paths:
        kind = kind_of(folder / name)  # an absolute `name` stays as it is
        if not kind:
            return folder / name
        if kind not in ("nothing", "a folder"):
            raise UserError(f"{asked_by}: {folder / name} is {kind}; a gin file is needed")
    known = [
        path.relative_to(folder).as_posix()
        for folder in search_paths
        if (folder / "runs").is_dir()
        for path in folder.glob("*/*.gin")
    ]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]}?" if close else ""
    places = ", ".join(str(folder) for folder in search_paths)
    raise UserError(f"{asked_by}: there is no gin file {name}; searched: {places}{hint}")


def read_file(
    reading: Bindings,
    name: str,
    search_paths: Sequence[Path],
    asked_by: str = "--gin_file",
    within: tuple[Path, ...] = (),
) -> None:
    """Add the bindings of one gin file, and of those it includes, to `reading`.

    A file that has been read already is not included again.

    Raises:
      UserError: file missing, not UTF-8, broken syntax, unknown name, circular include;
        names file and line.
    """
    path = find_file(name, search_paths, asked_by)
    resolved = path.resolve()
    if resolved in within:
        raise UserError(f"{asked_by}: {name} includes itself")
    if len(within) >= _DEEPEST_INCLUDE:
        raise UserError(f"{asked_by}: files include each other more than {_DEEPEST_INCLUDE} deep")
    if within and resolved in reading.read:
        return
    reading.read.add(resolved)
    for statement in _statements(read_text(path), str(path)):
        place = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            reading.add(Binding(scope, selector, parameter, value, place))
        elif isinstance(statement, config_parser.IncludeStatement):
            inside = (*within, resolved)
            read_file(reading, statement.filename, search_paths, place, inside)
        elif isinstance(statement, config_parser.ImportStatement):
            _import(statement.module, place)
            reading.imports.append(statement.module)


def _statements(text: str, filename: str) -> Iterator[Any]:
    """Gin's statements of a file's text; syntax errors become UserErrors with their line."""
    line = 1
    try:
        parser = config_parser.ConfigParser(
            text, _Delegate(lambda: f"{filename}:{parser.current_token.start[0]}")
        )
        for statement in parser:
            line = statement.location.line_num
            yield statement
    except UserError:  # of the delegate
        raise
    except SyntaxError as error:
        line = error.args[1][1] if len(error.args) > 1 else error.lineno or line
        reason = str(error.args[0]).splitlines()[-1].strip()
        word = _BARE_WORD.fullmatch(reason)
        if word:
            python = _PYTHON_CONSTANTS.get(word[1].lower())
            meant = f"{python}, or '{word[1]}' in quotes" if python else f"'{word[1]}' in quotes"
            reason = f"{word[1]} is no gin value; write {meant}"
        raise UserError(f"{filename}:{line}: {one_line(reason)}") from None
    except tokenize.TokenError as error:
        raise UserError(f"{filename}:{error.args[1][0] - 1}: {error.args[0]}") from None
    except (RecursionError, MemoryError):
        raise UserError(
            f"{filename}: lists lie in each other too deep in or behind line {line}"
        ) from None
    except _PARSER_ERRORS as error:
        raise UserError(f"{filename}: no gin in or behind line {line}: {one_line(error)}") from None


def _import(module: str, place: str) -> None:
    """``import my_package.my_task`` in a gin file: its configurables become known."""
    try:
        importlib.import_module(module)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{place}: import {module}: {one_line(error)}") from None


def read_command_line(reading: Bindings, bindings: Sequence[str]) -> None:
    """Add ``NAME=value`` bindings from the command line (``--gin.`` already taken off).

    Raises:
      UserError: no ``=``, an impossible name, or a value that needs quotes.
    """
    for text in bindings:
        name, equals, value = text.partition("=")
        place = f"--gin.{name}"
        if not equals:
            raise UserError(f"{place}: write --gin.{name}=value")
        if not _BINDING_NAME.fullmatch(name):
            raise UserError(f"{place}: {name!r} is not NAME, Class.field or scope/Class.field")
        scope, selector, parameter = config_parser.parse_binding_key(name)
        reading.add(Binding(scope, selector, parameter, parse_value(value, place), place))


def parse_value(text: str, place: str) -> Any:
    """The value of a command-line binding: gin syntax, or a bare string such as a path.

    Raises:
      UserError: neither; says how to quote it.
    """
    try:
        statement = next(config_parser.ConfigParser(f"VALUE = {text}\n", _Delegate(lambda: place)))
        return statement.value
    except UserError:  # of the delegate
        raise
    except (RecursionError, MemoryError):
        raise UserError(f"{place}: lists lie in each other too deep") from None
    except (SyntaxError, tokenize.TokenError, *_PARSER_ERRORS):
        pass
    if len(text) > _LONGEST_VALUE:
        raise UserError(f"{place}={text[:60]}...: not a gin value, and too long for a name")
    python = _PYTHON_CONSTANTS.get(text.strip().lower())
    if python:
        raise UserError(
            f"""{place}={text}: write {place}={python}, or {place}="'{text.strip()}'" if the """
            "word itself is meant"
        )
    if not _BARE_STRING.fullmatch(text):
        raise UserError(
            f"{place}={text}: not a gin value; a string is quoted twice, once for gin and once "
            f"""for the shell: {place}='"some text"'"""
        )
    return text


def _references(value: Any) -> Iterator[Any]:
    """Every macro, constant and configurable reference inside a value."""
    return gin_config.iterate_references({("", ""): {"": value}})


def _macro_name(reference: Any) -> str | None:
    """The macro's name if `reference` is one (``%NAME``), else None."""
    if reference.selector != "gin.macro":
        return None
    return str(reference.scoped_selector.rsplit("/", 1)[0])


def _is_required(reference: Any) -> bool:
    """Whether `reference` is ``%gin.REQUIRED``."""
    return bool(
        reference.selector == "gin.constant"
        and reference.scoped_selector.rsplit("/", 1)[0] == "gin.REQUIRED"
    )


def check(reading: Bindings) -> None:
    """Check for faults that only show in the whole configuration.

    Raises:
      UserError: a required or undefined macro (with the file that needs it), a macro given
        on the command line that nothing uses, a value of the wrong type.
    """
    used: dict[str, Binding] = {}
    for binding in reading.bindings.values():
        for reference in _references(binding.value):
            macro = _macro_name(reference)
            if macro is not None:
                used.setdefault(macro, binding)
    _check_command_line_macros(reading, used)
    _check_missing(reading, used)
    for binding in reading.bindings.values():
        if binding.parameter:
            _check_type(reading, binding)


def _check_command_line_macros(reading: Bindings, used: dict[str, Binding]) -> None:
    for label, binding in reading.bindings.items():
        if binding.parameter or not binding.place.startswith("--gin.") or label in used:
            continue
        if gin_config._REGISTRY.matching_selectors(binding.name):
            raise UserError(f"{binding.place}: which parameter? write --gin.{label}.field=value")
        raise UserError(f"{binding.place}: no gin file uses a macro {label}{nearest(label, used)}")


def _check_missing(reading: Bindings, used: dict[str, Binding]) -> None:
    missing = []
    for binding in reading.bindings.values():
        if any(_is_required(reference) for reference in _references(binding.value)):
            missing.append(f"{binding.label} (required by {binding.place})")
    for macro, user in used.items():
        if reading.macro(macro) is None:
            missing.append(f"{macro} (used by {user.label} at {user.place})")
    if missing:
        given = " ".join(f"--gin.{entry.split(' ')[0]}=..." for entry in missing)
        raise UserError(f"no value for {', '.join(missing)}; give {given}")


def _resolved(reading: Bindings, value: Any, binding: Binding, within: tuple[str, ...] = ()) -> Any:
    """`value` with its macros replaced by their values."""
    if isinstance(value, gin_config.ConfigurableReference):
        macro = _macro_name(value)
        if macro is None:
            return bounds.Unknown()  # known only when it is called
        if macro in within:
            circle = " -> ".join((*within, macro))
            raise UserError(f"{binding.place}: macros refer to each other: {circle}")
        definition = reading.bindings[macro]
        return _resolved(reading, definition.value, binding, (*within, macro))
    if isinstance(value, tuple | list):
        return type(value)(_resolved(reading, item, binding, within) for item in value)
    return value


def _check_type(reading: Bindings, binding: Binding) -> None:
    """Refuse a literal of the wrong type now, and not after an hour of indexing."""
    wrapped = _configurable(binding.name, binding.place).wrapped
    annotations = bounds.annotations(wrapped.__init__ if _is_plain_class(wrapped) else wrapped)
    value = _resolved(reading, binding.value, binding)
    if value is None and dataclasses.is_dataclass(wrapped):
        return  # left open: a model folder or the default says it, see from_gin
    expected = bounds.expected(annotations.get(binding.parameter, Any), value)
    if expected:
        raise UserError(
            f"{binding.place}: {binding.label} = {bounds.shown(value)}: expected {expected}"
        )


def _is_plain_class(wrapped: Any) -> bool:
    """Whether the parameters are annotated in ``__init__`` and not in the class."""
    return inspect.isclass(wrapped) and not dataclasses.is_dataclass(wrapped)
