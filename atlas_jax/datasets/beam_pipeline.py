"""`prepare` for passages as an Apache Beam pipeline (extra `[beam]`): many machines, same lines.

    files -> lines -> passages -> clean -> leaks out -> duplicates out -> shards

The functions are those of the one-machine path (`ByLine`, `PassageRules`), so that both write the
same lines; here in no order. Files are found, read and written through Beam's file systems: on a
disk, or in a bucket with Beam's own extra (`apache-beam[gcp]` for gs://).

Shards are written into `OUT/.unfinished` and get their names when all of them are there.
OUT/prepared.json is written last: what it does not note is not ready.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import combiners

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.datasets.checksums import NOTES
from atlas_jax.datasets.convert import (
    LEAKS,
    PASSAGES,
    ByLine,
    Dataset,
    Made,
    Part,
    check_rules,
    other_number,
)
from atlas_jax.datasets.passage_rules import AS_PUBLISHED, PassageRules, as_line, digest, rank

UNFINISHED = ".unfinished"
_TOLD = 20  # broken lines that are told one by one
_SHOWN = 60  # characters by which a broken line is recognised; a file is read in pieces
_COUNTS = "counts.jsonl"


def prepare_by_beam(
    dataset: Dataset,
    source: str,
    out: str,
    options: Sequence[str],
    sample: bool = False,
    rows: RowsConfig = STRICT,
    rules: PassageRules = AS_PUBLISHED,
    shards: int = 0,
) -> int:
    """Write the passages of a data set as `out`/passages-SSSSS-of-NNNNN.jsonl.

    What leaks is told in `out`/leaks-*.jsonl. All broken lines are found in one run; where they
    are not skipped, nothing is written then.

    Args:
      source: a folder with the published files, or files and patterns with commas between them.
      out: a folder, of its own or with the same passages in it.
      options: Beam's own options, such as `--runner=DataflowRunner`.
      sample: whether the files are a part of the published ones; then rows are not counted.
      rows: whether broken lines are skipped.
      rules: what is done with the passages.
      shards: number of files to write; 0 = as the runner likes.

    Returns:
      The number of passages; -1 if they were there already.

    Raises:
      UserError: no such files; the data set cannot be read by lines; a broken line; another number
        of rows than published; or `out` holds other passages.
    """
    check_rules(dataset, rules)
    part, read, sizes = _found(dataset, source)
    made_of, folder = Made(sizes, sample, rules.told()), f"{out.rstrip('/')}/"
    if _is_there(folder, made_of):
        return -1
    unfinished = f"{folder}{UNFINISHED}/"
    _remove(unfinished)
    try:
        _run(read, sorted(sizes), unfinished, options, rules, shards)
        counts = _counts(unfinished + _COUNTS)
        _check(counts, part, ", ".join(sorted(sizes)), sample, rows)
        shard_names = _finish(unfinished, folder)
    finally:
        _remove(unfinished)
    written = counts.get("passages", 0)
    _note(folder, {"rows": written, "shards": shard_names} | made_of.note())
    return int(written)


def _found(dataset: Dataset, source: str) -> tuple[Part, ByLine, dict[str, Any]]:
    """The part that makes passages of the files, how, and the size of each file in bytes.

    Raises:
      UserError: see `prepare_by_beam`.
    """
    parts = [(part, part.read) for part in dataset.parts if isinstance(part.read, ByLine)]
    if not parts:
        raise UserError(f"{dataset.name} is read as a whole, not by lines: leave --runner out")
    asked = [one for one in source.split(",") if one]
    for part, read in parts:
        (in_folder,) = part.sources  # what is read by lines has one kind of file
        sizes = dict[str, Any]()
        for one in asked:
            inside = f"{one.rstrip('/')}/{in_folder}"
            sizes |= _sizes(inside) if os.path.isdir(one) else _sizes(one) or _sizes(inside)
        if sizes:
            return part, read, sizes
    names = ", ".join(sorted({name for part, _ in parts for name in part.sources}))
    where = "\n  ".join(dataset.where)
    raise UserError(
        f"--source {source}: no such file; a folder has to hold {names}, published at\n  {where}"
    )


def _sizes(pattern: str) -> dict[str, Any]:
    """Size in bytes of each file that a pattern stands for."""
    try:
        (found,) = FileSystems.match([pattern])
    except (BeamIOError, ValueError) as error:
        raise UserError(f"{pattern}: {error}") from error
    return {one.path: one.size_in_bytes for one in found.metadata_list}


def _is_there(folder: str, made_of: Made) -> bool:
    """Whether these very passages were written before.

    Raises:
      UserError: `folder` holds other passages.
    """
    there = sorted(_sizes(f"{folder}passages*.jsonl"))
    if not there:
        return False
    noted = _read_notes(folder).get(PASSAGES, {})
    if made_of.is_noted({"sources": None} | noted) and noted.get("shards") == _names(there):
        return True
    raise UserError(
        f"{there[0]} is there, and was not made of these files by these rules; give another "
        "--out, or remove the passages in it"
    )


class _Split(beam.DoFn):
    """(file, line) -> lines of passages, and under their tags what leaks, is broken, is read."""

    def __init__(self, read: ByLine, rules: PassageRules) -> None:
        self._read, self._rules = read, rules

    def process(self, element: tuple[str, bytes]) -> Iterator[Any]:
        """Split, clean, and take out what leaks."""
        file, raw = element
        text = raw[:_SHOWN].decode("utf-8", "replace")
        try:
            rows = self._read.parsed(raw.removeprefix(strict_json.BYTE_ORDER_MARK), file)
        except UserError as error:
            yield beam.pvalue.TaggedOutput("broken", f"{error}; the line begins with {text!r}")
            return
        if rows is None:
            return
        yield beam.pvalue.TaggedOutput("read", 1)
        for row in rows:
            kept, report = self._rules.apply(row)
            if report is not None:
                yield beam.pvalue.TaggedOutput("leaks", as_line(report))
            elif kept is not None:
                yield as_line(kept)


def _ranked(line: str) -> tuple[bytes, tuple[int, str, str]]:
    row = json.loads(line)
    return digest(row), rank(row, line)


def _line_of(ranked: tuple[int, str, str]) -> str:
    return ranked[2]


def _run(
    read: ByLine, files: Sequence[str], unfinished: str, options: Sequence[str],
    rules: PassageRules, shards: int,
) -> None:  # fmt: skip
    """Run the pipeline and wait for its end.

    Raises:
      UserError: Beam knows no such runner, or refuses an option.
    """
    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    except (ValueError, ImportError) as error:
        raise UserError(f"Beam: {error}") from error
    lines = (
        pipeline
        | "Files" >> beam.Create(files)
        | "Lines" >> beam.io.ReadAllFromText(coder=BytesCoder(), with_filename=True)
    )
    split = lines | "Split" >> beam.ParDo(_Split(read, rules)).with_outputs(
        "broken", "leaks", "read", main="passages"
    )
    passages = split.passages
    if rules.config.deduplicate:
        passages = (
            passages
            | "Ranked" >> beam.Map(_ranked)
            | "First" >> beam.CombinePerKey(min)
            | "Values" >> beam.Values()
            | "Line" >> beam.Map(_line_of)
        )
    _write(passages, unfinished, PASSAGES, shards)
    if rules.leak is not None:
        _write(split.leaks, unfinished, LEAKS, 0)
    counts = [_counted("passages", passages), _counted("read", split.read)]
    counts += [_counted("broken", split.broken), _some(split.broken)]
    (
        counts
        | "Counts" >> beam.Flatten()
        | "Write counts"
        >> beam.io.WriteToText(unfinished + _COUNTS, num_shards=1, shard_name_template="")
    )
    pipeline.run().wait_until_finish()


def _write(lines: Any, folder: str, name: str, shards: int) -> None:
    stem, suffix = name.split(".")
    lines | f"Write {stem}" >> beam.io.WriteToText(
        f"{folder}{stem}", f".{suffix}", num_shards=shards
    )


def _pair(value: Any, name: str) -> str:
    return json.dumps([name, value])


def _counted(name: str, rows: Any) -> Any:
    """The line [name, number of rows]."""
    return (
        rows | f"Count {name}" >> combiners.Count.Globally() | f"{name}:" >> beam.Map(_pair, name)
    )


def _some(broken: Any) -> Any:
    """The line ["faults", the first broken lines in alphabetical order]."""
    first = broken | "Some broken" >> combiners.Top.Smallest(_TOLD)
    return first | "Faults:" >> beam.Map(_pair, "faults")


def _counts(path: str) -> dict[str, Any]:
    with FileSystems.open(path) as file:
        return dict(json.loads(line) for line in file.read().decode("utf-8").splitlines())


def _check(counts: dict[str, Any], part: Part, files: str, sample: bool, rows: RowsConfig) -> None:
    """Tell the broken lines.

    Raises:
      UserError: there are some and they are not skipped; or the published number is another.
    """
    broken, faults = counts.get("broken", 0), counts.get("faults", [])
    if broken and not rows.skip_broken:
        raise UserError(f"{broken:,} broken lines, such as\n  " + "\n  ".join(faults))
    for fault in faults:
        print(f"skipped: {fault}")
    read = counts.get("read", 0)
    if part.rows is not None and read != part.rows and not sample:
        raise UserError(other_number(files, read, part.rows))


def _finish(unfinished: str, folder: str) -> list[str]:
    """Give the shards their names in `folder`; return those of passages."""
    found = sorted([*_sizes(f"{unfinished}passages-*"), *_sizes(f"{unfinished}leaks-*")])
    old = list(_sizes(f"{folder}leaks-*"))
    if old:
        FileSystems.delete(old)
    FileSystems.rename(found, [folder + name for name in _names(found)])
    return [name for name in _names(found) if name.startswith("passages-")]


def _names(paths: Iterable[str]) -> list[str]:
    return [os.path.basename(path) for path in paths]


def _read_notes(folder: str) -> dict[str, Any]:
    if not FileSystems.exists(folder + NOTES):
        return {}
    with FileSystems.open(folder + NOTES) as file:
        where = folder + NOTES
        notes: dict[str, Any] = strict_json.parse_as(file.read(), dict[str, dict[str, Any]], where)
    return notes


def _note(folder: str, fields: dict[str, Any]) -> None:
    """Write OUT/prepared.json at once."""
    notes = _read_notes(folder) | {PASSAGES: fields}
    written = f"{folder}{UNFINISHED}.json"
    with FileSystems.create(written) as file:
        file.write(json.dumps(notes, indent=2).encode("utf-8"))
    if FileSystems.exists(folder + NOTES):
        FileSystems.delete([folder + NOTES])
    FileSystems.rename([written], [folder + NOTES])


def _remove(folder: str) -> None:
    """Remove all that lies in a folder, and the folder itself where there are folders."""
    if FileSystems.exists(folder.rstrip("/")):
        FileSystems.delete([folder.rstrip("/")])
    elif _sizes(f"{folder}**"):  # of a bucket
        FileSystems.delete([folder])
