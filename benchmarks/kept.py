"""Figures of long benchmarks, kept in a small JSON file: a table grows over calls and machines.

The file lies beside the page that is drawn from it. A run is kept by its name and a key of what
decides it. What is done is not run again; a run whose data or method has changed since is.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from atlas_jax.claims.results import versions
from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run: a key of what decides it, and its figures."""

    key: str
    figures: Figures


@dataclasses.dataclass(frozen=True)
class Kept:
    """All that a page is drawn from.

    Attributes:
      settings: those that all runs share.
      runs: by name.
      versions: of the libraries that computed the last of them.
    """

    settings: dict[str, Any]
    runs: dict[str, Measured] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A run that a table needs: its name, its key, and what gives its figures."""

    name: str
    key: str
    run: Callable[[], Figures]


def key_of(*decides: Any) -> str:
    """A key of values that JSON can hold."""
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> Kept | None:
    """What is kept in a file; None if there is none.

    Raises:
      UserError: the file is damaged; names the field.
    """
    return strict_json.read(path, Kept) if path.is_file() else None


def write(path: Path, kept: Kept) -> None:
    """Write the file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_text(path) as file:
        json.dump(dataclasses.asdict(kept), file, ensure_ascii=False, indent=1, sort_keys=True)
        file.write("\n")


def begun(path: Path, settings: Mapping[str, Any]) -> Kept:
    """What earlier calls have left in a file, or a beginning.

    Raises:
      UserError: the file has runs with other settings; names the first that differs.
    """
    own, kept = json.loads(json.dumps(settings)), read(path)
    if kept is None:
        return Kept(own)
    for name in [*own, *kept.settings]:
        before, now = (side.get(name) for side in (kept.settings, own))
        if before != now:
            raise UserError(
                f"{path} has runs with other settings: {name} was {before!r} and is {now!r}; take "
                "another --results"
            )
    return kept


def run_missing(path: Path, kept: Kept, wanted: Iterable[Wanted], minutes: float = 0) -> Kept:
    """Run what is missing, each kept as soon as it is done.

    Args:
      path: of the file.
      kept: what it has.
      wanted: in the order in which they are run.
      minutes: no run begins after them; 0 = no limit.

    Returns:
      All runs, of this and of earlier calls.
    """
    began = time.monotonic()
    for one in wanted:
        if one.name in kept.runs and kept.runs[one.name].key == one.key:
            continue
        if minutes and time.monotonic() - began > 60 * minutes:
            print(f"{minutes:g} minutes are over before {one.name}", file=sys.stderr)
            break
        done = Measured(one.key, {name: float(value) for name, value in one.run().items()})
        runs = {**kept.runs, one.name: done}
        kept = dataclasses.replace(kept, runs=runs, versions=versions())
        write(path, kept)
        print(json.dumps({one.name: done.figures}), flush=True)
    return kept


def put_between(page: Path, text: str) -> None:
    """Put what was measured into a page, between its two marks; what is written around it stays.

    Raises:
      UserError: the page lacks a mark.
    """
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page}: expected the lines {BEGIN} and {END} around what is measured")
    with atomic_text(page) as file:
        file.write(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
