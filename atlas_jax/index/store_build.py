"""Builds a passage store in shards: any number of processes, each with processes of its own.

What is done survives a kill: a shard counts as done by its mark (`ShardNote`), which is written
after it. The manifest is written last; with it the store is whole.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.file_sets import Paths
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.locks import locked
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.objects import Objects
from atlas_jax.core.parts import PARTS
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.progress import show_progress
from atlas_jax.core.whole import unwritten
from atlas_jax.index.corpus_parts import PART_BYTES, SHARD_ROWS, Division, Unit, divide
from atlas_jax.index.id_buckets import buckets_of, make_round, rounds_of
from atlas_jax.index.line_hash import LineHash
from atlas_jax.index.shard_pool import Job, ShardPool, workers_for
from atlas_jax.index.shard_writer import UNFINISHED, Recipe, ShardNote, mark_of, read_marks
from atlas_jax.index.shards import ShardedFiles
from atlas_jax.index.store_files import STORE_FORMAT, content_hashes, line_of
from atlas_jax.index.unknown import check_scripts

MANIFEST = "manifest.json"
_PLAN = f"{UNFINISHED}/plan.json"
_LOCK = ".lock"
_IGNORED = ("lost+found", _LOCK)  # of the root of a disk; our own
_SIGN_ROWS = 1 << 13  # passages read between two signs of life


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a corpus is divided.

    Attributes:
      part_bytes: of a large file, that make one shard.
      shard_rows: passages of other files that make one shard.
      workers: processes of this machine; 0 = one for each core.
    """

    part_bytes: int = PART_BYTES
    shard_rows: int = SHARD_ROWS
    workers: int = 0


def build_files(
    passages: Paths,
    directory: str | os.PathLike[str],
    recipe: Recipe,
    rows: RowsConfig = STRICT,
    progress: bool = True,
    cut: Cut = Cut(),
) -> None:
    """Write a store; all processes of a run must call it.

    Raises:
      UserError: see `PassageStore.build`.
    """
    build = _Build(passages, Objects(directory), recipe, rows, progress, cut)
    meeting = build.meeting
    try:
        with build.held:
            try:
                build.check_same(meeting.together("begin", build.begin))
                meeting.together("shards", build.shards)
                twice = meeting.together("ids", build.ids)
                build.check_unique(twice)
                meeting.together("manifest", build.finish)
            except Interrupted:
                raise
            except (UserError, OSError):
                build.drop()
                raise
    except OSError as error:
        raise unwritten(directory, error) from error


def is_built_in(directory: str | os.PathLike[str]) -> bool:
    """Whether a whole store is there; all processes of a run must call it.

    Raises:
      UserError: not all processes see it, or the place cannot be reached.
    """
    objects, meeting = Objects(directory), Meeting(f"passage store {os.fspath(directory)}")
    told = meeting.together("look", lambda: "there" if objects.has(MANIFEST) else None)
    if len(set(told)) > 1:
        raise Interrupted(
            f"{objects.at(MANIFEST)}: process {told.index('')} of {len(told)} does not see it, but "
            f"process {told.index('there')} does; let all processes see the same folder"
        )
    if told[0] and meeting.is_first:
        with contextlib.suppress(OSError):  # it may be read only
            objects.remove(UNFINISHED)  # that a kill behind the manifest left
    return bool(told[0])


def corpus_hash_of(passages: Paths, rows: RowsConfig, progress: bool) -> str:
    """The hash of the lines that a store of these passages has; each process reads its share.

    Raises:
      UserError: a passage is at fault.
    """
    meeting = Meeting("comparison of passages and store")
    bar = show_progress("read passages", shown=progress and meeting.is_first)

    def work() -> str:
        found, read = {}, 0
        with bar:
            for unit in divide(passages, rows).units[meeting.index :: meeting.count]:
                records, hashed = unit.records(rows), LineHash()
                # A unit may be a large file: the others must hear of this process meanwhile.
                while lot := list(itertools.islice(records, _SIGN_ROWS)):
                    hashed = hashed.of(line_of(record) for _, record in lot)
                    bar.update(len(lot))
                    read += len(lot)
                    meeting.sign("hash", f"{read} passages read")
                found[unit.number] = hashed
        return json.dumps(found)

    parts: dict[int, LineHash] = {}
    for told in meeting.together("hash", work):
        parts.update({int(key): LineHash(*one) for key, one in json.loads(told).items()})
    return functools.reduce(LineHash.then, (parts[n] for n in sorted(parts)), LineHash()).hex


class _Plan(TypedDict):
    """What an unfinished store is to become: a hash of it, and the run that works at it."""

    plan: str
    run: str


class _Build:
    """One build. Its methods are the steps, which all processes take together."""

    def __init__(
        self,
        passages: Paths,
        objects: Objects,
        recipe: Recipe,
        rows: RowsConfig,
        progress: bool,
        cut: Cut,
    ) -> None:
        self.meeting = Meeting(f"passage store {objects.root}")
        self._passages, self._objects, self._recipe = passages, objects, recipe
        self._rows, self._cut, self._ours = rows, cut, False
        self.held = contextlib.ExitStack()  # the lock
        self._progress = progress and self.meeting.is_first
        self._run = os.urandom(8).hex()

    @functools.cached_property
    def _division(self) -> Division:
        return divide(self._passages, self._rows, self._cut.part_bytes)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs away from a folder, which is made."""
        folder = check_output_folder(self._objects.root)
        missing = [one for one in (folder, *folder.absolute().parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder / _LOCK, str(folder)):
                yield
        finally:
            with contextlib.suppress(OSError):  # something lies in it
                for one in missing:
                    one.rmdir()

    def begin(self) -> str:
        """Process 0 looks at what is there, and removes what an attempt of another kind left.

        Returns:
          What all processes must find alike in the corpus.
        """
        shape = self._division.shape()
        if not self.meeting.is_first:
            return shape
        objects, plan = self._objects, self._plan()
        if not objects.is_remote:
            self.held.enter_context(self._alone())
        if objects.has(_PLAN):
            if self._found_plan()["plan"] != plan:
                self._remove()
        elif self._there():
            raise UserError(f"{objects.root} exists already; remove it or choose another directory")
        self._ours = True
        objects.write(_PLAN, json.dumps(_Plan(plan=plan, run=self._run)).encode())
        return shape

    def check_same(self, shapes: Sequence[str]) -> None:
        """Refuse a corpus that is not the same on all hosts.

        Raises:
          Interrupted: names a process that sees another one.
        """
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise Interrupted(
                    f"{self._passages}: process {number} of {len(shapes)} sees other files, or "
                    "files of other sizes, than process 0; give all hosts the same"
                )

    def _there(self) -> bool:
        """Whether there is something else than what a kill at the very beginning or end left."""
        if self._objects.is_remote:
            return bool(self._objects.names())
        others = {one.name for one in Path(self._objects.root).iterdir()} - {*_IGNORED}
        return others not in ({UNFINISHED}, set()) or bool(self._objects.names(UNFINISHED))

    def _found_plan(self) -> "_Plan":
        """What the unfinished store that is there was to become."""
        try:
            raw = self._objects.read(_PLAN)
            found: _Plan = strict_json.parse_as(raw, _Plan, self._objects.at(_PLAN))
        except Interrupted:
            raise
        except UserError:  # missing or damaged
            return _Plan(plan="", run="")
        return found

    def _plan(self) -> str:
        """What an unfinished store was to become."""
        recipe = self._recipe
        made_with = {tower: one.content_hash for tower, one in recipe.tokenizers.items()}
        parts = dataclasses.asdict(recipe.config), made_with, self._rows.skip_broken
        cut = self._cut.part_bytes, self._cut.shard_rows
        told = json.dumps([STORE_FORMAT, self._division.fingerprint(), parts, cut])
        return hashlib.sha256(told.encode()).hexdigest()

    def drop(self) -> None:
        """Remove what was made; the next attempt would meet the same fault."""
        if not self._ours:
            return
        run = self._found_plan()["run"]  # none if it could not be written, or the store is whole
        if run == self._run or not run and not self._objects.has(MANIFEST):
            self._remove()

    def _remove(self) -> None:
        """Remove all that was made. The marks go first: what has one must be there.

        The plan goes last: by it the next attempt knows what it may remove.
        """
        for below in (f"{UNFINISHED}/done", "shards", "ids", f"{UNFINISHED}/ids", UNFINISHED):
            self._objects.remove(below)

    def shards(self) -> None:
        """Make this process's shards."""
        done = read_marks(self._objects)
        meeting = self.meeting
        own = sum(one.size for one in self._division.units) / meeting.count
        workers = workers_for(self._cut.workers, -(-int(own) // self._cut.part_bytes))
        pool = ShardPool(workers, self._objects.root, self._recipe, self._rows)
        made = 0
        before = sum(note["rows"] for note in done.values())
        with show_progress("tokenise", initial=before, shown=self._progress) as bar:

            def count(note: ShardNote) -> None:
                nonlocal made
                made += 1
                bar.update(note["rows"])
                meeting.sign("shards", f"{made} shards made")

            pool.run(self._jobs(done), count)

    def _jobs(self, done: Mapping[str, ShardNote]) -> Iterator[Job]:
        """The shards that this process is to make."""
        division, meeting = self._division, self.meeting
        for unit in division.units:
            mine = division.owner(unit, 0, meeting.count) == meeting.index
            if unit.part is not None:
                if mine and unit.shard(0) not in done:
                    yield Job(unit.shard(0), unit, True)
            elif (mine or division.is_shared(unit, meeting.count)) and not _is_done(unit, done):
                yield from self._lots(unit, done)

    def _lots(self, unit: Unit, done: Mapping[str, ShardNote]) -> Iterator[Job]:
        """The shards of a unit that is read from its start."""
        meeting, size = self.meeting, self._cut.shard_rows
        records = (record for _, record in unit.records(self._rows))
        for number in itertools.count():
            lot = list(itertools.islice(records, size))
            meeting.sign("shards", f"{number} lots of unit {unit.number} read")
            owner, name = self._division.owner(unit, number, meeting.count), unit.shard(number)
            if owner == meeting.index and name not in done:
                yield Job(name, lot, len(lot) < size)
            if len(lot) < size:
                return

    @functools.cached_property
    def _notes(self) -> list[ShardNote]:
        """Of all shards, in order; those without passages are left out."""
        done = read_marks(self._objects)
        missing = next((one for one in self._division.units if not _is_done(one, done)), None)
        if missing is not None:
            raise Interrupted(
                f"{self._objects.at(mark_of(missing.shard(0)))}: a shard is missing; start the "
                "command again, and let all processes see the same folder"
            )
        notes = [done[name] for name in sorted(done) if done[name]["rows"]]
        if not notes:
            raise UserError(f"{self._passages} holds no passages")
        return notes

    @functools.cached_property
    def _count(self) -> int:
        return sum(note["rows"] for note in self._notes)

    @functools.cached_property
    def _files(self) -> ShardedFiles:
        shards = [(note["name"], note["rows"]) for note in self._notes]
        recipe = self._recipe
        widths = {tower: (recipe.length(tower), recipe.dtype(tower).name) for tower in PARTS}
        return ShardedFiles(self._objects, shards, buckets_of(self._count), widths)

    def _record(self, row: int) -> dict[str, Any]:
        found: dict[str, Any] = strict_json.parse(self._files.lines([row])[0], f"row {row}")
        return found

    def ids(self) -> str | None:
        """Make this process's share of the ids; tells the first two rows with one id."""
        meeting, twice = self.meeting, list[tuple[int, int]]()
        for number in range(meeting.index, rounds_of(self._count), meeting.count):
            found = make_round(
                self._objects, self._notes, number, lambda row: str(self._record(row)["id"])
            )
            twice += [found] if found else []
            meeting.sign("ids", f"{number} rounds of ids")
        return json.dumps(min(twice)) if twice else None

    def check_unique(self, told: Sequence[str]) -> None:
        """Refuse equal ids, by what the processes have found.

        Raises:
          UserError: names the id, and both files and lines.
        """
        twice = [json.loads(one) for one in told if one]
        if twice:
            row, first = min(twice)
            raise UserError(
                f"duplicate passage id {self._record(row)['id']!r}: {self._place(first)} and "
                f"{self._place(row)}; every passage needs an id of its own"
            )

    def _place(self, row: int) -> str:
        """File and line of a row."""
        shard = int(np.searchsorted(self._files.starts, row, side="right")) - 1
        unit, lot = map(int, self._notes[shard]["name"].split("-"))
        found = self._division.units[unit]
        found = dataclasses.replace(found, part=found.counted())
        before = lot * self._cut.shard_rows + row - int(self._files.starts[shard])
        file, line = next(itertools.islice(found.records(self._rows), before, None))[0]
        return f"{file}:{line}"

    def finish(self) -> None:
        """Process 0 writes the manifest."""
        if not self.meeting.is_first:
            return
        check_scripts(self._count, self._records, self._recipe.tokenizers)
        if self._found_plan()["run"] != self._run:
            raise Interrupted(
                f"{self._objects.root}: another run writes this store since; let it end, and start "
                "one at a time"
            )
        write_manifest(self._objects, self._recipe, self._notes, True)
        self._objects.remove(UNFINISHED)

    def _records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        lines = self._files.lines(rows)
        return [
            strict_json.parse(line, f"row {row}") for line, row in zip(lines, rows, strict=True)
        ]


def _is_done(unit: Unit, done: Mapping[str, ShardNote]) -> bool:
    """Whether all shards of a unit are there."""
    for number in itertools.count():
        note = done.get(unit.shard(number))
        if note is None:
            return False
        if note["last"]:
            return True
    raise AssertionError


def complete(objects: Objects, recipe: Recipe, notes: Sequence[ShardNote]) -> None:
    """Make a store of shards that this process has just written, and whose ids differ.

    Raises:
      OSError: it cannot be written.
    """
    count = sum(note["rows"] for note in notes)
    for number in range(rounds_of(count)):
        twice = make_round(objects, notes, number, str)
        assert not twice
    write_manifest(objects, recipe, notes, False)
    objects.remove(UNFINISHED)


def write_manifest(
    objects: Objects, recipe: Recipe, notes: Sequence[ShardNote], told: bool
) -> None:
    """Write manifest.json, which makes a store whole.

    Args:
      notes: of its shards, in order; none is empty.
      told: tell on stderr how many passages were too long.

    Raises:
      OSError: it cannot be written.
    """
    count = sum(note["rows"] for note in notes)
    made_with = {tower: recipe.tokenizers[tower].content_hash for tower in PARTS}
    lines = (LineHash(note["rows"], int(note["hash"], 16)) for note in notes)
    corpus_hash = functools.reduce(LineHash.then, lines).hex
    manifest: dict[str, Any] = {
        "format": STORE_FORMAT,
        "count": count,
        **content_hashes(corpus_hash, recipe.config, made_with),
    }
    for tower in PARTS:
        cut, length = sum(note["cut"][tower] for note in notes), recipe.length(tower)
        if cut and told:
            print(
                f"the {tower} sees the first {length} tokens (StoreConfig.{tower}_length) of "
                f"{cut:,} of {count:,} passages, which are longer",
                file=sys.stderr,
            )
        manifest[tower] = {
            "tokenizer": made_with[tower],
            "format": getattr(recipe.config, f"{tower}_format"),
            "length": length,
            "max_id": max(note["max_id"][tower] for note in notes),
            "dtype": recipe.dtype(tower).name,
        }
    manifest["buckets"] = buckets_of(count)
    manifest["shards"] = [{"name": note["name"], "rows": note["rows"]} for note in notes]
    objects.write(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
