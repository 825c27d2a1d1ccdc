"""Entry point `python -m atlas_jax.index_command`: look into a saved index, and change it.

    atlas-jax index show work/index --store=work/store
    atlas-jax index show work/store
    atlas-jax index add new.jsonl --model=work/run/final --store=work/store --index=work/index
    atlas-jax index replace changed.jsonl --model=... --store=... --index=...
    atlas-jax index delete ID ID --store=work/store
    atlas-jax index compact --store=work/store --index=work/index --keep=1
    atlas-jax index diff 3 4 --questions=dev.jsonl --model=... --store=... --index=...

Each change makes one version, see docs/living_index.md. A model is needed only where there are new
passages. All but `show` run on several hosts, too: the same command on each, with the flags of
`core/multihost.py`. Each subcommand is a function of its own with its own flags.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError, nearest
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.multihost import joined
from atlas_jax.core.paths import check_output_file
from atlas_jax.index.inspection import (
    describe,
    describe_versions,
    lines_of,
    lines_of_versions,
)
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.store_files import read_corpus

USAGE_ERROR = 2


def show(argv: Sequence[str]) -> int:
    """Say what an index or a store holds; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax index show",
        description="What a saved index holds, and which store and passage encoder made it; or "
        "which versions a passage store has.",
    )
    parser.add_argument("index", help="folder of the index, or of a store")
    parser.add_argument("--store", default="", help="folder of a passage store: is it of this one?")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return launch(_show, parser, argv)


def _show(flags: argparse.Namespace) -> None:
    if (Path(flags.index) / "manifest.json").exists():
        found = describe_versions(flags.index)
        lines = lines_of_versions(found)
    else:
        found = describe(flags.index, flags.store)
        lines = lines_of(found)
    print(json.dumps(found, indent=2) if flags.json else "\n".join(lines))


def change(what: str, argv: Sequence[str]) -> int:
    """Add, replace or delete passages; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog=f"atlas-jax index {what}", description=f"{SUBCOMMANDS[what][1]}, as one version."
    )
    if what == "delete":
        parser.add_argument("ids", nargs="+", help="ids of passages")
    else:
        parser.add_argument("passages", help="file of passages, as for build_index")
        parser.add_argument("--model", required=True, help="folder of the model that embeds them")
        parser.add_argument("--index", default="", help="folder of the index; '' = keep none")
    parser.add_argument("--store", required=True, help="folder of the passage store")
    return launch(functools.partial(_change, what), parser, argv, on_devices=True)


def _change(what: str, flags: argparse.Namespace) -> None:
    from atlas_jax import face  # what only looks needs no model

    if what == "delete":
        version = face.change_index(store=flags.store, delete=flags.ids)
    else:
        records = [record for _, record in read_corpus(flags.passages, progress=False)]
        changes: dict[str, Any] = {what: records}
        version = face.change_index(flags.model, store=flags.store, index=flags.index, **changes)
    _tell(flags.store, version)


def compact(argv: Sequence[str]) -> int:
    """Join segments and give up old versions; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax index compact", description=f"{SUBCOMMANDS['compact'][1]}."
    )
    parser.add_argument("--store", required=True, help="folder of the passage store")
    parser.add_argument("--index", default="", help="folder of its index, which is joined, too")
    parser.add_argument("--reader_states", default="", help="folder of what a reader keeps, too")
    parser.add_argument("--keep", type=int, default=1, help="versions that can still be read")
    from atlas_jax import from_gin  # so that the settings of ScaNN can be bound; needs no model

    scann = functools.partial(from_gin.told, ScannConfig)
    return launch(lambda flags: _compact(flags, scann()), parser, argv, on_devices=True)


def _compact(flags: argparse.Namespace, scann: ScannConfig) -> None:
    from atlas_jax.corpus.change import compact as join

    found = join(flags.store, flags.index, flags.keep, flags.reader_states, scann)
    _tell(flags.store, found.version["version"])


def diff(argv: Sequence[str]) -> int:
    """Say which answers a change moved, and which not; 0 when done, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax index diff", description=f"{SUBCOMMANDS['diff'][1]}."
    )
    parser.add_argument("before", help="version of the store, or a time in ISO 8601")
    parser.add_argument("after", help="another one")
    parser.add_argument("--questions", required=True, help="file of questions, as for evaluate")
    parser.add_argument("--model", required=True, help="folder of the model that answers")
    parser.add_argument("--store", required=True, help="folder of the passage store")
    parser.add_argument("--index", default="", help="folder of its index; '' = embed now")
    parser.add_argument("--task", default="qa", help="kind of the questions")
    parser.add_argument("--k", type=int, default=0, help="passages that are read; 0 = as usual")
    parser.add_argument("--output", default="", help="jsonl file for all questions")
    return launch(_diff, parser, argv, on_devices=True)


def _diff(flags: argparse.Namespace) -> None:
    from atlas_jax import face
    from atlas_jax.answering.difference import differences, table
    from atlas_jax.answering.results import Answer

    if flags.k < 0:
        raise UserError(f"--k={flags.k}: 1 passage or more, or 0 for as many as usual")
    if flags.output:
        check_output_file(flags.output, "--output")
    read = {"k": flags.k} if flags.k else None
    told: dict[str, Any] = {
        "store": flags.store,
        "index": flags.index,
        "task": flags.task,
        "read": read,
    }

    def answers(version: str) -> list[Answer]:  # one version is in memory at a time
        return face.load(flags.model, as_of=version, **told).evaluate(flags.questions).answers

    found = differences(answers(flags.before), answers(flags.after))
    if joined()[0]:  # one process tells
        return
    if flags.output:
        write_jsonl(flags.output, (one.as_record() for one in found))
    Console().print(table(found))


def _tell(store: str, version: int) -> None:
    if joined()[0]:  # one process tells
        return
    found = describe_versions(store)
    found["versions"] = [one for one in found["versions"] if one["version"] == version]
    print("\n".join(lines_of_versions(found)))


# Subcommand -> (function of its arguments, what it does).
SUBCOMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "show": (show, "what a saved index holds, and what made it; the versions of a store"),
    "add": (functools.partial(change, "add"), "add passages with new ids"),
    "replace": (functools.partial(change, "replace"), "give passages a new text"),
    "delete": (functools.partial(change, "delete"), "delete passages by their ids"),
    "diff": (diff, "which answers a change of the passages moved, and which did not follow"),
    "compact": (compact, "join the segments of a store, and give up old versions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code, or 2 when there is none of that name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, SUBCOMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in SUBCOMMANDS.items()]
        print("\n".join(["usage: atlas-jax index SUBCOMMAND [flags]", "", *lines]))
        return 0 if arguments else USAGE_ERROR
    if arguments[0] not in SUBCOMMANDS:
        hint = nearest(arguments[0], SUBCOMMANDS)
        print(f"atlas-jax index: error: no subcommand {arguments[0]}{hint}", file=sys.stderr)
        return USAGE_ERROR
    return SUBCOMMANDS[arguments[0]][0](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
