"""The parts of a corpus's files: what becomes one shard, and which process reads it.

The parts depend on the files alone, not on the number of processes:

- A large plain jsonl file is cut into ranges of bytes, which are read apart from each other. Each
  is a shard.
- Any other file (compressed, a table) is read from its start. Small files are read together.
  Each 65,536 passages of them are a shard. If there are fewer such lots than processes, all
  processes read them, and each takes its share of the shards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import Paths, Place, base_of, passage_files, read_files
from atlas_jax.core.jsonl import STRICT, Part, RowsConfig, lines_before
from atlas_jax.core.layouts import PASSAGES, Layout, PassageFields, layout_of
from atlas_jax.core.paths import as_path, is_remote
from atlas_jax.index.store_files import check_filled, strings_of

PART_BYTES = 1 << 25  # of a corpus; about 50,000 passages of a hundred words
SHARD_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Unit:
    """Files that one process after the other may read on its own.

    Attributes:
      number: its place among the units.
      part: the lines of its only file; None = all of its files.
      size: bytes to read.
    """

    number: int
    files: tuple[str, ...]
    base: str
    part: Part | None
    size: int

    def records(self, rows: RowsConfig = STRICT) -> Iterator[tuple[Place, PassageFields]]:
        """File, line and checked record of every passage.

        Raises:
          UserError: names file and line.
        """
        if self.part is None or not self.part.start:
            yield from self._read(self.part, rows)
            return
        try:
            yield from self._read(self.part, rows)
        except UserError:
            for _ in self._read(self.counted(), rows):
                pass  # it fails again, and says the line's number in the file
            raise

    def counted(self) -> Part | None:
        """The part with the number of lines before it."""
        if self.part is None or not self.part.start:
            return self.part
        return self.part._replace(before=lines_before(self.files[0], self.part.start))

    def _read(self, part: Part | None, rows: RowsConfig) -> Iterator[tuple[Place, PassageFields]]:
        for place, record in read_files(self.files, self.base, _check, rows, part):
            yield place, strings_of(record)

    def shard(self, number: int) -> str:
        """The name of one of its shards."""
        return f"{self.number:05d}-{number:05d}"


@dataclasses.dataclass(frozen=True)
class Division:
    """The units of a corpus, divided among processes."""

    units: tuple[Unit, ...]

    def owner(self, unit: Unit, shard: int, processes: int) -> int:
        """The process that makes a shard of a unit."""
        return (unit.number + (shard if self.is_shared(unit, processes) else 0)) % processes

    def is_shared(self, unit: Unit, processes: int) -> bool:
        """Whether all processes read a unit."""
        whole = sum(one.part is None for one in self.units)
        return unit.part is None and whole < processes

    def shape(self) -> str:
        """What processes that see the same files agree on: names, sizes and ranges."""
        told = [(unit.files, unit.part, unit.size) for unit in self.units]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def fingerprint(self) -> str:
        """What tells these files from others, without reading them: names, sizes, times."""
        files = sorted({file for unit in self.units for file in unit.files})
        told = [(file, *_stat(file)) for file in files]
        parts = [(unit.files, unit.part) for unit in self.units]
        return hashlib.sha256(json.dumps([told, parts]).encode()).hexdigest()


def divide(path: Paths, rows: RowsConfig = STRICT, part_bytes: int = PART_BYTES) -> Division:
    """The units of a corpus.

    Args:
      path: see `passage_files`.
      rows: where broken rows are counted, no file is cut.
      part_bytes: of a large file that is cut.

    Raises:
      UserError: there is no such file.
    """
    files = passage_files(path)
    base = base_of(path, files)
    units: list[Unit] = []
    together: list[str] = []
    sizes = 0

    def close() -> None:
        nonlocal sizes
        if together:
            units.append(Unit(len(units), tuple(together), base, None, sizes))
        together.clear()
        sizes = 0

    for file in files:
        size = _stat(file)[0]
        if sizes + size > part_bytes:
            close()
        if size > part_bytes and _can_be_cut(file, rows):
            parts = -(-size // part_bytes)
            for one in range(parts):
                part = Part(one * size // parts, (one + 1) * size // parts)
                units.append(Unit(len(units), (file,), base, part, part.end - part.start))
            continue
        together.append(file)
        sizes += size
    close()
    return Division(tuple(units))


def _can_be_cut(file: str, rows: RowsConfig) -> bool:
    plain = file.lower().endswith(".jsonl") and not rows.skip_broken
    return plain and layout_of(file, PASSAGES) is not None


def _stat(file: str) -> tuple[int, int]:
    """Size and time of a file; 0 where a bucket does not tell, and for what is no file."""
    try:
        found: Any = as_path(file).stat()
    except OSError:
        return 0, 0
    if is_remote(file):
        return int(found.length or 0), int(found.mtime or 0)
    return found.st_size, found.st_mtime_ns


def _check(file: str, line: int, record: Mapping[str, Any], layout: Layout | None) -> None:
    check_filled(record, f"{file}:{line}", layout.called if layout else None)
