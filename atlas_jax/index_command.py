"""Entry point `python -m atlas_jax.index_command`: look into a saved index.

    atlas-jax index show work/index
    atlas-jax index show work/index --store=work/store

No model is needed. Each subcommand is a function of its own with its own flags.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from atlas_jax.core.config import launch
from atlas_jax.core.errors import nearest
from atlas_jax.index.inspection import describe, lines_of

USAGE_ERROR = 2


def show(argv: Sequence[str]) -> int:
    """Say what an index holds; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax index show",
        description="What a saved index holds, and which store and passage encoder made it.",
    )
    parser.add_argument("index", help="folder of the index")
    parser.add_argument("--store", default="", help="folder of a passage store: is it of this one?")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return launch(_show, parser, argv)


def _show(flags: argparse.Namespace) -> None:
    found = describe(flags.index, flags.store)
    if flags.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines_of(found)))


# Subcommand -> (function of its arguments, what it does).
SUBCOMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "show": (show, "what a saved index holds, and what made it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code, or 2 when there is none of that name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
        print("\n".join(["usage: atlas-jax index SUBCOMMAND [flags]", "", *lines]))
        return 0 if arguments else USAGE_ERROR
    if arguments[0] not in SUBCOMMANDS:
        hint = nearest(arguments[0], SUBCOMMANDS)
        print(f"atlas-jax index: error: no subcommand {arguments[0]}{hint}", file=sys.stderr)
        return USAGE_ERROR
    return SUBCOMMANDS[arguments[0]][0](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
