"""From published files to jsonl: streaming, resumable, checked by number of rows and by hash.

An unfinished file is called `.NAME.partial` and has a note of its progress beside it. The same
command continues from there.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, BrokenRows, JsonObject, RowsConfig, atomic_text, raw_lines
from atlas_jax.core.paths import (
    as_path,
    check_output_file,
    check_output_folder,
    file_sha256,
    utf8_text,
)
from atlas_jax.core.progress import show_progress
from atlas_jax.datasets.checksums import NOTES, note, read_checksums, read_notes, verified
from atlas_jax.datasets.passage_rules import (
    AS_PUBLISHED,
    PassageRules,
    as_line,
    without_duplicates,
)

# The published rows in order, each as the rows made from it (none, one or several).
Read = Callable[[Sequence[Path], RowsConfig], Iterator[Sequence[JsonObject]]]

PASSAGES, LEAKS = "passages.jsonl", "leaks.jsonl"

_SAVE_EVERY = 10_000  # published rows between two notes


@dataclasses.dataclass(frozen=True)
class ByLine:
    """A `Read` of files whose lines can be read in any order, by any machine.

    Attributes:
      rows_of: the rows made from one line that is not blank; None for a line that is no published
        row, such as a table's heading. Gets the line without its end, and where it stands; raises
        a UserError that begins with this.
    """

    rows_of: Callable[[str, str], Sequence[JsonObject] | None]

    def __call__(self, paths: Sequence[Path], rows: RowsConfig) -> Iterator[Sequence[JsonObject]]:
        """Read all files in their order."""
        for path in paths:
            broken = BrokenRows(path, rows)
            for number, raw in raw_lines(path):
                try:
                    made = self.parsed(raw, f"{path}:{number}")
                except UserError as error:
                    broken.take(error)
                    continue
                if made is not None:
                    yield made
            broken.tell()

    def parsed(self, raw: bytes, where: str) -> Sequence[JsonObject] | None:
        """The rows made from the bytes of a line; None if it is blank or no published row.

        Raises:
          UserError: the line is broken; begins with `where`.
        """
        line = utf8_text(raw, where).rstrip("\r\n")
        return self.rows_of(line, where) if line.strip() else None


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

    @property
    def holds_passages(self) -> bool:
        """Whether a `PassageRules` applies to its rows."""
        return self.output == PASSAGES


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
    rules: PassageRules = AS_PUBLISHED,
) -> dict[str, int]:
    """Write all parts whose files are in `source`; parts already made from these files are kept.

    `out`/prepared.json notes the SHA-256 of all files read and written.

    Args:
      sample: whether the files are samples of the published ones; then rows are not counted.
      checksums: see `checksums.read_checksums`; a published file named in it must have this
        SHA-256.
      rows: what happens to a broken row.
      rules: what is done with passages; other rows stay as they are. Passages that leak are told
        in `out`/leaks.jsonl.

    Returns:
      File name -> number of rows; -1 for a file that was already there.

    Raises:
      UserError: `source` has none of the files (the error says where they are published), a file
        has a broken row, another number of rows or another SHA-256, or there are rules for a data
        set without passages.
    """
    check_rules(dataset, rules)
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
        asked = rules if part.holds_passages else AS_PUBLISHED
        made_of = Made(sources, sample, asked.told())
        if target.exists() and _is_made_of(target, made_of):
            counts[part.output] = -1
            continue
        written = counts[part.output] = _write(part, paths, target, sample, rows, asked)
        found = {"rows": written, "sha256": file_sha256(target)} | made_of.note()
        note(target.parent, part.output, found)
    _tell_unknown(dataset, folder)
    if not counts:
        raise UserError(_absent(dataset, folder))
    return counts


@dataclasses.dataclass(frozen=True)
class Made:
    """What decides the content of a prepared file, as prepared.json notes it.

    Attributes:
      sources: name -> SHA-256 of each published file.
      sample: whether its rows were not counted.
      rules: `PassageRules.told`.
    """

    sources: dict[str, str]
    sample: bool
    rules: dict[str, Any]

    def note(self) -> dict[str, Any]:
        """The fields of the note."""
        rules = {"rules": self.rules} if self.rules else {}
        return {"sources": self.sources, "sample": self.sample} | rules

    def is_noted(self, noted: dict[str, Any]) -> bool:
        """Whether a note says the same."""
        sample, rules = bool(noted.get("sample", self.sample)), noted.get("rules", {})
        return (noted["sources"], sample, rules) == (self.sources, self.sample, self.rules)


def check_rules(dataset: Dataset, rules: PassageRules) -> None:
    """Refuse rules for passages where a data set has none.

    Raises:
      UserError: names the data set.
    """
    if rules.told() and not any(part.holds_passages for part in dataset.parts):
        raise UserError(
            f"{dataset.name} has no passages, so PassagesConfig and LeakConfig.files have nothing "
            "to change"
        )


def _is_made_of(target: Path, made_of: Made) -> bool:
    """Whether an existing file was made in this way; if not, it is made again.

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
    if made_of.is_noted(noted):
        return True
    other = "of other files" if noted.get("rules", {}) == made_of.rules else "by other rules"
    print(f"{target}: made anew, for it was made {other}", file=sys.stderr)
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
    part: Part, paths: Sequence[Path], target: Path, sample: bool, policy: RowsConfig,
    rules: PassageRules,
) -> int:  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    note = target.with_name(f".{target.name}.progress.json")
    source: list[list[Any]] = [[path.name, path.stat().st_size] for path in paths]
    source.append(["", rules.told()])
    check_output_file(target)
    done = _noted(note, partial, source)
    try:
        _read(part, paths, partial, note, done, policy, rules)
    except BaseException:
        if not note.exists():  # nothing that a later run could continue
            partial.unlink(missing_ok=True)
        raise
    if part.rows is not None and done.read != part.rows and not sample:
        partial.unlink()
        note.unlink(missing_ok=True)
        raise UserError(other_number(", ".join(map(str, paths)), done.read, part.rows))
    if rules.config.deduplicate:
        done.written = _write_once_each(partial, target)
        partial.unlink()
    else:
        partial.replace(target)
    note.unlink(missing_ok=True)
    return done.written


def other_number(files: str, found: int, published: int) -> str:
    """The message for files with another number of rows than was published."""
    return (
        f"{files}: {found:,} rows, but the published files have {published:,}; download again, or "
        "give --sample to take a part of them"
    )


def _write_once_each(source: Path, target: Path) -> int:
    """Write the lines of passages without duplicates; return their number."""

    def lines() -> Iterator[str]:
        return (raw.decode("utf-8").rstrip("\n") for _, raw in raw_lines(source))

    count = 0
    with atomic_text(target) as out:
        for line in without_duplicates(lines):
            out.write(f"{line}\n")
            count += 1
    return count


def _read(
    part: Part, paths: Sequence[Path], partial: Path, note: Path, done: _Progress,
    policy: RowsConfig, rules: PassageRules,
) -> None:  # fmt: skip
    """Append the missing rows, and note the progress from time to time."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(partial.open("r+b" if done.size else "wb"))
        file.truncate(done.size)
        file.seek(done.size)
        leaks = rules.leak and stack.enter_context(atomic_text(partial.with_name(LEAKS)))
        rows = _ruled(part.read(paths, policy), rules, leaks)
        missing = itertools.islice(rows, done.read, None)
        for produced in show_progress(part.output, missing, part.rows, done.read):
            for row in produced:
                file.write(f"{as_line(row)}\n".encode())
            done.read += 1
            done.written += len(produced)
            if done.read % _SAVE_EVERY == 0:
                _save(note, file, done)
        file.flush()
        os.fsync(file.fileno())


def _ruled(
    published: Iterable[Sequence[JsonObject]], rules: PassageRules, leaks: TextIO | None
) -> Iterator[Sequence[JsonObject]]:
    """The rows as the rules leave them; those that leak are reported."""
    for rows in published:
        kept = []
        for row in rows:
            passage, report = rules.apply(row)
            if passage is not None:
                kept.append(passage)
            if report is not None and leaks is not None:
                leaks.write(f"{as_line(report)}\n")
        yield kept


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


def single(rows: Iterable[JsonObject]) -> Iterator[Sequence[JsonObject]]:
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
