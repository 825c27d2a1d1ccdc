"""The page of every command's `--help`."""

import contextlib
import importlib
import io
import os

from atlas_jax.cli import COMMANDS

INTRODUCTION = """# Commands

What `atlas-jax COMMAND --help` prints. Commands that read gin files take bindings, too:
[Configuration](../configuration.md).

"""
WIDTH = "100"  # of a line of help, in characters


def page() -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION]
    for name, (module, words) in COMMANDS.items():
        parts.append(f"## {name}\n\n{words[0].upper()}{words[1:]}.\n\n")
        parts.append(f"```text\n{help_of(module)}\n```\n\n")
    return "".join(parts)


def help_of(module: str) -> str:
    """What the command prints when it is asked for help."""
    told = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            importlib.import_module(f"atlas_jax.{module}").main(["--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return told.getvalue().strip()
