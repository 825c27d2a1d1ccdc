"""The launcher: T5X's gin flags on argparse, strict, and one line for a user's error.

    --gin_file=runs/finetune_qa.gin      repeatable; later files override earlier ones
    --gin.MODEL_DIR=runs/first           a macro
    --gin.TrainConfig.total_steps=30     a parameter
    --gin.reader/OptimizerConfig.learning_rate=4e-5    a parameter in a scope
    --gin_search_paths=a,b               searched before the current directory and gin/

Files are searched in the given search paths, then in the current directory, then in the folder that
holds ``gin/`` and in ``gin/`` itself. So ``gin/runs/x.gin`` and ``runs/x.gin`` both work, in a
clone and with an installed package.
"""

import argparse
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from atlas_jax.core import gin_files, multihost
from atlas_jax.core.backend import missing_backend
from atlas_jax.core.compiler import enlarge_stacks
from atlas_jax.core.errors import UserError, is_panic, no_value_for, one_line, printable
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.paths import text_problem
from atlas_jax.core.preemption import PREEMPTED, Preempted
from atlas_jax.core.terminal import expand_arguments, guarded, told

USER_ERROR = 2
INTERRUPTED = 130

_MISSING_ARGUMENTS = re.compile(
    r"No values supplied by Gin or caller for arguments: (?P<names>\[.*?\]).*"
    r"In call to configurable '(?P<configurable>[\w.]+)'[^\n]*?"
    r"(?: in scope '(?P<scope>[\w/]+)')?$",
    re.DOTALL,
)
# The text that gin appends to every exception that passes through it.
_GIN_TRAILER = re.compile(r"\n  In (call to configurable|bindings string) .*", re.DOTALL)


@functools.cache
def gin_folder() -> Path:
    """The project's ``gin/`` folder: beside the package in a clone, else the installed one.

    Raises:
      UserError: the folder is missing in the installation.
    """
    beside = Path(__file__).resolve().parents[2] / "gin"
    if (beside / "runs").is_dir():
        return beside
    try:
        files = importlib.metadata.files("atlas-jax") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gin" and file.parts[-4:-2] == ("atlas-jax", "gin"):
            return Path(str(file.locate())).resolve().parents[1]
    raise UserError(f"no gin folder at {beside} nor in the installed package; reinstall atlas-jax")


def search_paths(extra: Sequence[str] = ()) -> list[Path]:
    """The folders in which gin files are searched, in this order."""
    folder = gin_folder()
    return [*(Path(path) for path in extra), Path("."), folder.parent, folder]


def load_gin(
    files: Sequence[str],
    bindings: Sequence[str] = (),
    extra_search_paths: Sequence[str] = (),
    unread: Mapping[str, Any] | None = None,
) -> None:
    """Replace gin's configuration by these files and ``NAME=value`` bindings, checked and locked.

    ``unread``: values for macros that the files require but the caller does not use.

    Raises:
      UserError: see `gin_files`; then nothing is bound.
    """
    gin.clear_config()
    reading = gin_files.Bindings()
    paths = search_paths(extra_search_paths)
    for file in files:
        gin_files.read_file(reading, file, paths)
    gin_files.read_command_line(reading, bindings)
    reading.fill_required(unread or {})
    gin_files.check(reading)
    reading.apply()


def clear_gin() -> None:
    """Remove all bindings from gin."""
    gin.clear_config()


def config_text() -> str:
    """All bindings as a gin file, which `--gin_file` can read again."""
    return str(gin.config_str())


def write_config(path: str | os.PathLike[str], text: str) -> None:
    """Write a configuration as a gin file (atomically)."""
    with atomic_text(path) as file:
        file.write(text)


def launch(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    on_devices: bool = False,
    unread: Mapping[str, Any] | None = None,
    tuple_flags: Mapping[str, str] | None = None,
    text_flags: Mapping[str, str] | None = None,
) -> int:
    """Parse flags and gin, call `main` with the flags, return the exit code.

    These errors end with code 2 and one line on stderr: a UserError, an error of the operating
    system (a full disk, no permission), a backend that JAX cannot start, too little memory, and a
    library that fails on its input. Ctrl-C ends with code 130. A run that saved because of SIGTERM
    ends with 75, and a closed stdout with 141. Any other exception is a bug and keeps its
    traceback. `~` at the beginning of a path is the home folder.

    Args:
      main: gets the parsed flags; its result None counts as 0.
      parser: the entry point's own flags; the gin flags are added here.
      argv: the arguments, sys.argv[1:] if None.
      on_devices: whether the command computes on all devices. If so, it has the flags of
        `multihost`, and the processes are joined before `main` is called.
      unread: see `load_gin`.
      tuple_flags: flags of the parser that are short for binding a field to a tuple:
        {"profile_steps": "ProfileConfig.steps"} reads `--profile_steps=10,12` as
        `--gin.ProfileConfig.steps='(10, 12)'`.
      text_flags: the same for a field that is a text.
    """
    enlarge_stacks()
    parser.allow_abbrev = False
    group = parser.add_argument_group("gin", "as in T5X; --gin.NAME=value binds a macro or field")
    group.add_argument("--gin_file", action="append", default=[], metavar="FILE")
    group.add_argument("--gin_search_paths", default="", metavar="DIR,DIR")
    if on_devices:
        multihost.add_flags(parser)
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        for argument in arguments:
            if problem := text_problem(argument):
                raise UserError(f"{ascii(argument)} holds {problem}")
        short = tuple_flags or {}, text_flags or {}
        flags = _read_flags(parser, expand_arguments(arguments), unread, *short)
        if on_devices:
            multihost.start(flags)
        return main(flags) or 0

    return guarded(parser.prog, lambda: _report(parser.prog, run))


def _read_flags(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    unread: Mapping[str, Any] | None,
    tuple_flags: Mapping[str, str],
    text_flags: Mapping[str, str],
) -> argparse.Namespace:
    """Parse the flags and pass gin its part."""
    bindings = [argument for argument in arguments if argument.startswith("--gin.")]
    if parser.get_default("multihost") is None:  # the entry point does not set it either
        multihost.refuse_flags(parser.prog, arguments)
    flags = parser.parse_args([a for a in arguments if not a.startswith("--gin.")])
    for flag, field in tuple_flags.items():
        if getattr(flags, flag) is not None:
            bindings.append(f"--gin.{field}=({getattr(flags, flag)})")
    for flag, field in text_flags.items():
        if getattr(flags, flag) is not None:
            bindings.append(f"--gin.{field}={getattr(flags, flag)!r}")
    extra = [path for path in flags.gin_search_paths.split(",") if path]
    load_gin(flags.gin_file, [b.removeprefix("--gin.") for b in bindings], extra, unread)
    return flags


def _report(program: str, run: Callable[[], int]) -> int:
    """Return the exit code of `run`; print one line for an error that is not a bug."""
    try:
        return run()
    except SystemExit as stop:  # argparse: bad flags, or --help
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    except UserError as error:
        message = _GIN_TRAILER.sub("", str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        message = told(error, _GIN_TRAILER.sub("", str(error)))
    except (AssertionError, RuntimeError, MemoryError) as error:
        message = _too_large(error)
        if not message and not isinstance(error, NotImplementedError):
            message = missing_backend() or ""
        if not message:
            raise
    except TypeError as error:
        found = _MISSING_ARGUMENTS.search(str(error))
        if found is None:
            raise
        message = _missing_fields(found)
    except Preempted as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        if not is_panic(error):
            raise
        message = f"a library broke down on its input: {one_line(error)}"
    print(f"{program}: error: {printable(message)}", file=sys.stderr)
    return USER_ERROR


def _too_large(error: BaseException) -> str:
    """The message for an error about too little memory; '' for other errors."""
    text = one_line(_GIN_TRAILER.sub("", str(error)) or type(error).__name__)
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        return f"more memory is needed than there is: {text}"
    return ""


def _missing_fields(found: re.Match[str]) -> str:
    """Gin's report of unbound arguments, as one line that says what to bind."""
    scope = f"{found['scope']}/" if found["scope"] else ""
    fields = [
        f"{scope}{found['configurable']}.{name}" for name in re.findall(r"'(\w+)'", found["names"])
    ]
    return no_value_for(fields)
