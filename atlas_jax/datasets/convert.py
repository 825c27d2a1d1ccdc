"""From published files to jsonl: streaming, resumable, checked by number of rows and by hash.

An unfinished file is called `.NAME.partial` and has a note of its progress beside it. The same
command continues from there.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig, atomic_text
from atlas_jax.core.paths import as_path, check_output_file, check_output_folder, file_sha256
from atlas_jax.core.progress import show_progress
from atlas_jax.datasets.checksums import NOTES, note, read_checksums, read_notes, verified

Row = dict[str, Any]
# The published rows in order, each as the rows made from it (none, one or several).
Read = Callable[[Sequence[Path], RowsConfig], Iterator[Sequence[Row]]]

_SAVE_EVERY = 10_000  # published rows between two notes


@dataclasses.dataclass(frozen=True)
class Part:
    """One file to write.

    Attributes:
      output: its name.
      sources: names of the published files that it is made from, in the source folder; a name
        may have wildcards and then stands for all files that match.
      rows: number of published rows in them; None if a file has no fixed number.
      read: opens them; it is told what happens to a broken row.
    """

    output: str
    sources: tuple[str, ...]
    rows: int | None
    read: Read


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A published data set.

    Attributes:
      about: a description in one line.
      where: where its files are published, one line each.
      parts: the files made from them.
      looks_like: a pattern; files that match it but belong to no part are reported.
    """

    name: str
    about: str
    where: tuple[str, ...]
    parts: tuple[Part, ...]
    looks_like: str = ""


def prepare(
    dataset: Dataset,
    source: str | Path,
    out: str | Path,
    sample: bool = False,
    checksums: str | Path = "",
    rows: RowsConfig = STRICT,
) -> dict[str, int]:
    """Write all parts whose files are in `source`; parts already made from these files are kept.

    `out`/prepared.json notes the SHA-256 of all files read and written.

    Args:
      sample: whether the files are samples of the published ones; then rows are not counted.
      checksums: see `checksums.read_checksums`; a published file named in it must have this
        SHA-256.
      rows: what happens to a broken row.

    Returns:
      File name -> number of rows; -1 for a file that was already there.

    Raises:
      UserError: `source` has none of the files (the error says where they are published), or a
        file has a broken row, another number of rows or another SHA-256.
    """
    folder, counts = as_path(source), dict[str, int]()
    check_output_folder(out, "--out")
    sums = read_checksums(folder, checksums)
    for part in dataset.parts:
        paths = [path for name in part.sources for path in sorted(folder.glob(name))]
        if len(paths) < len(part.sources):
            continue
        if part.output in counts:  # made from another of its sources
            continue
        target, sources = Path(out) / part.output, verified(paths, folder, sums)
        if target.exists() and _is_made_of(target, sources, sample):
            counts[part.output] = -1
            continue
        written = counts[part.output] = _write(part, paths, target, sample, rows)
        found = {"rows": written, "sha256": file_sha256(target), "sources": sources}
        note(target.parent, part.output, found | {"sample": sample})
    _tell_unknown(dataset, folder)
    if not counts:
        raise UserError(_absent(dataset, folder))
    return counts


def _is_made_of(target: Path, sources: dict[str, str], sample: bool) -> bool:
    """Whether an existing file was made from these sources; if not, it is made again.

    Raises:
      UserError: `prepare` did not write it, or it was changed later.
    """
    noted = read_notes(target.parent).get(target.name)
    if noted is None:
        raise UserError(
            f"{target} is there, and no command of this kind wrote it; give another --out, or "
            "remove it"
        )
    found = file_sha256(target)
    if found != noted["sha256"]:
        raise UserError(
            f"{target} was changed since it was written: its SHA-256 is {found[:12]}, and "
            f"{NOTES} says {noted['sha256'][:12]}; give another --out, or remove it"
        )
    if noted["sources"] == sources and bool(noted.get("sample", sample)) == sample:
        return True
    print(f"{target}: made anew, for it was made of other files", file=sys.stderr)
    return False


def _tell_unknown(dataset: Dataset, folder: Path) -> None:
    """Report files that look like the data set's but are not used."""
    if not dataset.looks_like:
        return
    known = {path for part in dataset.parts for name in part.sources for path in folder.glob(name)}
    for path in sorted(set(folder.glob(dataset.looks_like)) - known):
        print(f"{path}: not taken; no file of {dataset.name} has this name", file=sys.stderr)


def _absent(dataset: Dataset, folder: Path) -> str:
    names = sorted({name for part in dataset.parts for name in part.sources})
    return "\n".join(
        [
            f"{folder} holds none of the files of {dataset.name}: {', '.join(names)}",
            "they are published at",
            *(f"  {line}" for line in dataset.where),
        ]
    )


@dataclasses.dataclass
class _Progress:
    """Progress of a file: published rows read, rows and bytes written, and its sources."""

    read: int
    written: int
    size: int
    source: list[list[Any]]


def _write(
    part: Part, paths: Sequence[Path], target: Path, sample: bool, policy: RowsConfig
) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    note = target.with_name(f".{target.name}.progress.json")
    source = [[path.name, path.stat().st_size] for path in paths]
    check_output_file(target)
    done = _noted(note, partial, source)
    try:
        _read(part, paths, partial, note, done, policy)
    except BaseException:
        if not note.exists():  # nothing that a later run could continue
            partial.unlink(missing_ok=True)
        raise
    if part.rows is not None and done.read != part.rows and not sample:
        partial.unlink()
        note.unlink(missing_ok=True)
        names = ", ".join(str(path) for path in paths)
        raise UserError(
            f"{names}: {done.read:,} rows, but the published files have {part.rows:,}; download "
            "again, or give --sample to take a part of them"
        )
    partial.replace(target)
    note.unlink(missing_ok=True)
    return done.written


def _read(
    part: Part, paths: Sequence[Path], partial: Path, note: Path, done: _Progress,
    policy: RowsConfig,
) -> None:  # fmt: skip
    """Append the missing rows, and note the progress from time to time."""
    with partial.open("r+b" if done.size else "wb") as file:
        file.truncate(done.size)
        file.seek(done.size)
        rows = itertools.islice(part.read(paths, policy), done.read, None)
        for produced in show_progress(part.output, rows, part.rows, done.read):
            for row in produced:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
            done.read += 1
            done.written += len(produced)
            if done.read % _SAVE_EVERY == 0:
                _save(note, file, done)
        file.flush()
        os.fsync(file.fileno())


def _noted(note: Path, partial: Path, source: list[list[Any]]) -> _Progress:
    """The progress of an interrupted run; the beginning if it read other files."""
    try:
        done: _Progress = strict_json.read(note, _Progress)
        if done.source == source and partial.stat().st_size >= done.size:
            return done
    except (OSError, UserError):
        pass
    return _Progress(0, 0, 0, source)


def _save(note: Path, file: Any, done: _Progress) -> None:
    file.flush()
    os.fsync(file.fileno())
    done.size = file.tell()
    with atomic_text(note) as out:
        json.dump(dataclasses.asdict(done), out)


def single(rows: Iterable[Row]) -> Iterator[Sequence[Row]]:
    """Make one row from each published row."""
    return ((row,) for row in rows)


def texts(values: Sequence[Any], where: str) -> list[str]:
    """The texts of a list that are not empty, each once.

    Raises:
      UserError: a value is not a text, or all are empty; begins with `where`.
    """
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{where} must hold texts, but has {value!r}"[:300])
    kept = list(dict.fromkeys(value for value in values if value.strip()))
    if not kept:
        raise UserError(f"{where} holds no text that is not empty")
    return kept


def filled(value: str, where: str) -> str:
    """Return a text that must not be empty.

    Raises:
      UserError: it is empty; begins with `where`.
    """
    if not value.strip():
        raise UserError(f"{where} is empty")
    return value
