"""Reading gin files strictly: every name is checked before anything is bound.

gin-config itself binds a missing ``%gin.REQUIRED`` or an undefined macro in silence when
`parse_config` is used, and says "No configurable matching" without the nearest name. Here
files and command-line bindings are first read into plain `Binding`s, each with the place
it was written; then all of them are checked together; only then are they given to gin.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from atlas_jax.core.errors import UserError, nearest
from atlas_jax.core.terminal import expand_home

# The only scopes the program opens: one configurable, two settings (reader/OptimizerConfig...).
SCOPES = ("reader", "retriever")

_BINDING_NAME = re.compile(r"(?:\w+/)*[A-Za-z_]\w*(?:\.\w+)*")
# A value that gin cannot parse is taken as a string if it looks like a path, a name or a
# schedule; anything with quotes or brackets is more likely a slip.
_BARE_STRING = re.compile(r"[^\s'\"(){}\[\]@%#][^'\"(){}\[\]#\n]*")
_BARE_WORD = re.compile(r"Failed to parse token '(\w+)'")  # as gin words it
_PYTHON_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


@dataclasses.dataclass(frozen=True)
class Binding:
    """One ``scope/Name.parameter = value``; a macro has the parameter ''. `place`: where from."""

    scope: str
    name: str
    parameter: str
    value: Any
    place: str

    @property
    def label(self) -> str:
        """As it is written in a gin file, without the value."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.name}.{self.parameter}" if self.parameter else f"{scope}{self.name}"


@dataclasses.dataclass
class Reading:
    """What the files and the command line say: the last binding of a name counts."""

    bindings: dict[str, Binding] = dataclasses.field(default_factory=dict)
    imports: list[str] = dataclasses.field(default_factory=list)

    def add(self, binding: Binding) -> None:
        """Take a binding after checking its names.

        Raises:
          UserError: unknown scope, configurable or parameter; names the nearest one. Or a `~name`
            of nobody.
        """
        if binding.parameter:
            binding = _checked(binding)
        binding = dataclasses.replace(binding, value=expand_home(binding.value, binding.place))
        self.bindings[binding.label] = binding

    def macro(self, name: str) -> Binding | None:
        """The binding of the macro `name`, if there is one."""
        return self.bindings.get(name)

    def fill_required(self, values: Mapping[str, Any]) -> None:
        """Give these macros a value where they are still ``%gin.REQUIRED``."""
        for name, value in values.items():
            binding = self.bindings.get(name)
            if binding is not None and any(map(_is_required, _references(binding.value))):
                self.bindings[name] = dataclasses.replace(binding, value=value)

    def apply(self) -> None:
        """Give everything to gin and lock it."""
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
    """The registered configurable that `name` (possibly with modules in front) means."""
    registry = gin_config._REGISTRY
    matches = registry.matching_selectors(name)
    if not matches:
        own = [c.name for selector, c in registry.items() if not selector.startswith("gin.")]
        raise UserError(f"{place}: no configurable is called {name}{nearest(name, own)}")
    if len(matches) > 1:
        raise UserError(f"{place}: {name} is ambiguous, write one of: {', '.join(sorted(matches))}")
    return registry[matches[0]]


def _checked(binding: Binding) -> Binding:
    """`binding` under its configurable's shortest name, once scope and parameter are known."""
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


def find_file(name: str, search_paths: Sequence[Path], asked_by: str) -> Path:
    """The first of `search_paths` that holds the gin file `name`.

    Raises:
      UserError: there is none; lists the search paths and the nearest file name.
    """
    for folder in search_paths:
        if (folder / name).is_file():  # an absolute `name` stays as it is
            return folder / name
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
    reading: Reading,
    name: str,
    search_paths: Sequence[Path],
    asked_by: str = "--gin_file",
    within: tuple[Path, ...] = (),
) -> None:
    """Add the bindings of one gin file, and of those it includes, to `reading`.

    Raises:
      UserError: file missing, not UTF-8, broken syntax, unknown name, circular include;
        names file and line.
    """
    path = find_file(name, search_paths, asked_by)
    if path.resolve() in within:
        raise UserError(f"{asked_by}: {name} includes itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for statement in _statements(text, str(path)):
        place = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            reading.add(Binding(scope, selector, parameter, value, place))
        elif isinstance(statement, config_parser.IncludeStatement):
            inside = (*within, path.resolve())
            read_file(reading, statement.filename, search_paths, place, inside)
        elif isinstance(statement, config_parser.ImportStatement):
            _import(statement.module, place)
            reading.imports.append(statement.module)


def _statements(text: str, filename: str) -> Iterator[Any]:
    """Gin's statements of a file's text; syntax errors become UserErrors with their line."""
    try:
        parser = config_parser.ConfigParser(
            text, _Delegate(lambda: f"{filename}:{parser.current_token.start[0]}")
        )
        yield from parser
    except SyntaxError as error:
        line = error.args[1][1] if len(error.args) > 1 else error.lineno
        reason = str(error.args[0]).splitlines()[-1].strip()
        word = _BARE_WORD.fullmatch(reason)
        if word:
            python = _PYTHON_CONSTANTS.get(word[1].lower())
            meant = f"{python}, or '{word[1]}' in quotes" if python else f"'{word[1]}' in quotes"
            reason = f"{word[1]} is no gin value; write {meant}"
        raise UserError(f"{filename}:{line}: {reason}") from None
    except tokenize.TokenError as error:
        raise UserError(f"{filename}:{error.args[1][0] - 1}: {error.args[0]}") from None


def _import(module: str, place: str) -> None:
    """``import my_package.my_task`` in a gin file: its configurables become known."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{place}: import {module}: {error}") from None


def read_command_line(reading: Reading, bindings: Sequence[str]) -> None:
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
    except (SyntaxError, tokenize.TokenError):
        pass
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


def check(reading: Reading) -> None:
    """Check what only the whole configuration shows.

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


def _check_command_line_macros(reading: Reading, used: dict[str, Binding]) -> None:
    for label, binding in reading.bindings.items():
        if binding.parameter or not binding.place.startswith("--gin.") or label in used:
            continue
        if gin_config._REGISTRY.matching_selectors(binding.name):
            raise UserError(f"{binding.place}: which parameter? write --gin.{label}.field=value")
        raise UserError(f"{binding.place}: no gin file uses a macro {label}{nearest(label, used)}")


def _check_missing(reading: Reading, used: dict[str, Binding]) -> None:
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


class _Unknown:
    """Stands for the result of a configurable reference: not known before it is called."""


def _resolved(reading: Reading, value: Any, binding: Binding, within: tuple[str, ...] = ()) -> Any:
    """`value` with its macros replaced by what they stand for."""
    if isinstance(value, gin_config.ConfigurableReference):
        macro = _macro_name(value)
        if macro is None:
            return _Unknown()
        if macro in within:
            circle = " -> ".join((*within, macro))
            raise UserError(f"{binding.place}: macros refer to each other: {circle}")
        definition = reading.bindings[macro]
        return _resolved(reading, definition.value, binding, (*within, macro))
    if isinstance(value, tuple | list):
        return type(value)(_resolved(reading, item, binding, within) for item in value)
    return value


def _check_type(reading: Reading, binding: Binding) -> None:
    """A literal of the wrong type is an error now, not after an hour of indexing."""
    wrapped = _configurable(binding.name, binding.place).wrapped
    hinted = wrapped.__init__ if _is_plain_class(wrapped) else wrapped
    try:
        annotation = typing.get_type_hints(hinted).get(binding.parameter, Any)
    except NameError:  # a name imported for type checking alone
        return
    value = _resolved(reading, binding.value, binding)
    if not accepts(annotation, value):
        plain = inspect.isclass(annotation) and not typing.get_args(annotation)
        expected = annotation.__name__ if plain else str(annotation).replace("typing.", "")
        raise UserError(f"{binding.place}: {binding.label} = {value!r}: expected {expected}")


def _is_plain_class(wrapped: Any) -> bool:
    """Whether the parameters' annotations stand on ``__init__`` and not on the class."""
    return inspect.isclass(wrapped) and not dataclasses.is_dataclass(wrapped)


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a gin value fits a field's annotation; unknown annotations accept anything."""
    if isinstance(value, _Unknown) or annotation is Any:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is Path:
        return isinstance(value, str)
    if origin is tuple and isinstance(value, tuple):
        if len(arguments) == 2 and arguments[1] is ...:
            return all(accepts(arguments[0], item) for item in value)
        return len(value) == len(arguments) and all(map(accepts, arguments, value))
    expected = origin or annotation
    if expected is Sequence:
        return isinstance(value, tuple | list)
    if expected in (bool, str, tuple, list, dict):
        return isinstance(value, expected)
    return True
