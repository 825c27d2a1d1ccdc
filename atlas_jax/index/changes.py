"""Change a passage store: every batch of changes makes one version, whole or not at all.

All processes of a run make a version together. They wait for each other through the coordination
service (`Meeting`), not through the devices. If one fails, all end with its message.
"""

import collections
import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import Interrupted, UserError
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.objects import Objects, place_of
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.whole import unwritten
from atlas_jax.index.corpus_parts import SHARD_ROWS
from atlas_jax.index.living import LivingStore, segment_folder
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.shard_writer import (
    Recipe,
    ShardNote,
    ragged,
    write_rows,
    write_shard,
)
from atlas_jax.index.store_build import complete
from atlas_jax.index.store_files import line_of, normalise
from atlas_jax.index.versions import (
    Change,
    Version,
    changing,
    collect,
    commit,
    flush_folders,
)

Passage = Mapping[str, Any]
EmbedSegment = Callable[[str, PassageStore, LivingStore], None]  # its name, it, the store before
Tidy = Callable[[LivingStore], None]


@dataclass(frozen=True)
class Batch:
    """Changes that become visible together, as one version.

    Attributes:
      add: passages {id, title?, section?, text} with new ids.
      replace: passages whose ids the store has.
      delete: ids that the store has.
    """

    add: Sequence[Passage] = ()
    replace: Sequence[Passage] = ()
    delete: Sequence[str] = ()

    def records(self) -> tuple[list[PassageFields], list[PassageFields]]:
        """The passages to add and to replace, checked.

        Raises:
          UserError: a field is missing or empty, an id comes twice, or nothing is changed.
        """
        added = [normalise(one, f"add: passage {i}") for i, one in enumerate(self.add)]
        replaced = [normalise(one, f"replace: passage {i}") for i, one in enumerate(self.replace)]
        ids = [one["id"] for one in (*added, *replaced)] + list(self.delete)
        if not ids:
            raise UserError("there is nothing to change: add, replace or delete passages")
        times = collections.Counter(ids)
        if len(times) < len(ids):
            twice = times.most_common(1)[0][0]
            raise UserError(f"the id {twice!r} is changed twice in one batch; change it once")
        return added, replaced


def change(
    directory: str | os.PathLike[str],
    batch: Batch,
    tokenizers: Mapping[str, Tokenizer],
    embed: EmbedSegment = lambda name, segment, now: None,
    after: int | None = None,
    opened: Sequence[PassageStore] = (),
    tidy: Tidy = lambda store: None,
) -> LivingStore:
    """Make the next version of a store; all processes of a run must call it, with the same batch.

    Process 0 keeps other runs away and makes the version. Each process tokenises its share of the
    new passages, in lots of ``SHARD_ROWS``.

    Args:
      directory: of the store.
      tokenizers: of "reader" and "retriever"; only the new passages are tokenised. Not needed
        where passages are only deleted.
      embed: called before the version exists, with the new segment if there is one, and with the
        store as it is before the change.
      after: the version that is to be changed; None = the newest.
      opened: segments that were opened with these tokenizers before.
      tidy: called in process 0 with the store as it then is, whether the change is made or failed,
        to remove what was made of segments that no version names.

    Returns:
      The store as of the new version.

    Raises:
      UserError: an unknown or taken id, a passage at fault, other tokenizers than the store's,
        another run that changes it, or a disk that cannot be written; of another process, too,
        whose number is told. The store is then unchanged.
      Interrupted: a process is missing, or has another batch or another folder.
    """
    folder = place_of(directory)
    made_with: Any = {f"{tower}_tokenizer": one for tower, one in tokenizers.items()}
    with _making(folder, tidy) as making:

        def begin() -> str:
            # Refuses other tokenizers.
            known = LivingStore.as_of(folder, "", **made_with, opened=opened).segments
            making.begin(known)
            return hashlib.sha256(
                json.dumps([*batch.records(), *batch.delete]).encode()
            ).hexdigest()

        making.same("begin", begin, "was given other changes than")
        added, replaced = batch.records()
        told = Change(added=len(added), replaced=len(replaced), deleted=len(batch.delete))
        found: list[tuple[LivingStore, np.ndarray, Version]] = []

        def plan() -> str:
            now = making.now()
            if after not in (None, now.version["version"]):
                raise UserError(
                    f"{folder} is at version {now.version['version']}, but version {after} is "
                    "loaded here; load the newest one to change it"
                )
            gone = _rows(now, added, replaced, batch.delete)
            dead = np.sort(np.concatenate([_dead(now), now.places_n[gone]]))
            count = now.count - len(gone) + len(added) + len(replaced)
            if count < 1:
                raise UserError(f"delete: {folder} would hold no passage; keep one")
            names = list(now.version["segments"])
            found.append((now, dead, _version(now.version, names, dead, count, told)))
            return str(now.version["version"])

        making.same("plan", plan, "sees another version than")
        now, dead, version = found[0]
        segments = list(now.segments)
        if added or replaced:
            version["segments"].append(name := making.name(version["version"]))
            recipe = Recipe(now.config, tokenizers)
            segments.append(new := making.segment(name, recipe, [*added, *replaced]))
            embed(name, new, now)
        return making.tidied(LivingStore.of(folder, making.commit(version, dead), segments, dead))


def compact(
    directory: str | os.PathLike[str],
    keep: int = 1,
    embed: Callable[[str, LivingStore], None] = lambda name, store: None,
    tidy: Tidy = lambda store: None,
) -> LivingStore:
    """Write the living passages as one segment, and give up all but the newest versions.

    All processes of a run must call it; each copies its share.

    Args:
      keep: versions that can still be read, this one among them.
      embed: called before the version exists with the store that it copies.
      tidy: as for `change`.

    Raises:
      UserError, Interrupted: as `change`.
    """
    if keep < 1:
        raise UserError(f"keep = {keep}: keep 1 version or more")
    folder = place_of(directory)
    with _making(folder, tidy) as making:

        def begin() -> str:
            making.begin(LivingStore.as_of(folder).segments)
            return str(keep)

        making.same("begin", begin, "keeps another number of versions than")
        found: list[LivingStore] = []

        def plan() -> str:
            found.append(making.now())
            return str(found[0].version["version"])

        making.same("plan", plan, "sees another version than")
        now = found[0]
        names, number = list(now.version["segments"]), now.version["version"] + 1
        if not now.is_plain:
            names = [making.name(number)]
            making.copy(names[0], now)
            embed(names[0], now)
        told = Change(added=0, replaced=0, deleted=0)
        dead = np.zeros(0, np.int64)
        version = _version(now.version, names, dead, now.count, told)
        version["oldest"] = max(now.version["oldest"], number - keep + 1)
        making.commit(version, dead)
        if making.meeting.is_first:
            collect(folder)
        return making.tidied(LivingStore.as_of(folder, str(number)))


def _rows(
    store: LivingStore,
    added: list[PassageFields],
    replaced: list[PassageFields],
    deleted: Sequence[str],
) -> np.ndarray:
    """Rows that go, since they are deleted or replaced."""
    for record in added:
        if store.find(record["id"]) is not None:
            raise UserError(
                f"add: {store.directory} has a passage with the id {record['id']!r} already; "
                "replace it, or choose another id"
            )
    rows = [store.find(one) for one in (*(record["id"] for record in replaced), *deleted)]
    for number, row in enumerate(rows):
        if row is None:
            is_new = number < len(replaced)
            missing = replaced[number]["id"] if is_new else deleted[number - len(replaced)]
            raise UserError(
                f"{'replace' if is_new else 'delete'}: {store.directory} has no passage with the "
                f"id {missing!r}"
            )
    return np.asarray(rows, np.int64)


def _dead(store: LivingStore) -> np.ndarray:
    every = np.arange(store.starts[-1], dtype=np.int64)
    return np.delete(every, store.places_n)


def _version(
    now: Version, segments: list[str], dead: np.ndarray, count: int, told: Change
) -> Version:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return Version(
        format=now["format"], version=now["version"] + 1, time=time, segments=segments,
        dead=len(dead), count=count, change=told, oldest=now["oldest"],
    )  # fmt: skip


def _shards(count: int) -> list[tuple[str, int, int]]:
    """The name of each shard of a segment, its first row, and the row behind its last."""
    starts = range(0, count, SHARD_ROWS)
    return [(f"00000-{n:05d}", at, min(at + SHARD_ROWS, count)) for n, at in enumerate(starts)]


@dataclass(frozen=True)
class _MadeWith:
    """What a manifest says of a tokenizer that is not at hand."""

    content_hash: str
    dtype: np.dtype

    @property
    def vocab_size(self) -> int:
        """The largest vocabulary whose ids fit into the type of the stored tokens."""
        return int(np.iinfo(self.dtype).max)


@contextlib.contextmanager
def _making(folder: Path, tidy: Tidy) -> Iterator["_Making"]:
    """What makes a version; if that fails, nothing of it stays."""
    making = _Making(folder, tidy)
    try:
        with making.held:
            try:
                yield making
            except BaseException:
                with contextlib.suppress(OSError, UserError):  # the fault matters more
                    making.give_up()
                raise
    except OSError as error:
        raise unwritten(folder, error) from error


class _Making:
    """A version that is being made by all processes. Its methods are steps that all take together.

    Attributes:
      meeting: of the processes.
      held: the lock, in process 0.
    """

    def __init__(self, folder: Path, tidy: Tidy) -> None:
        self.meeting, self.held = Meeting(f"change of {folder}"), contextlib.ExitStack()
        self._folder, self._tidy = folder, tidy
        self._opened: Sequence[PassageStore] = ()
        self._is_locked = False

    def give_up(self) -> None:
        """Remove what was made beside the store; `changing` removes what was made in it."""
        if self._is_locked:
            self._tidy(self.now())

    def tidied(self, store: LivingStore) -> LivingStore:
        """The store, when what belongs to segments that it does not name any more is removed."""
        if self._is_locked:
            self._tidy(store)
        return store

    def begin(self, opened: Sequence[PassageStore]) -> None:
        """Keep other runs away; a part of this process's first step."""
        self._opened = opened
        if self.meeting.is_first:
            self.held.enter_context(changing(self._folder))
            self._is_locked = True

    def now(self) -> LivingStore:
        """The newest version, which nobody else changes."""
        return LivingStore.as_of(self._folder, opened=self._opened)

    def same(self, step: str, work: Callable[[], str], otherwise: str) -> None:
        """A step in which all processes must find the same.

        Raises:
          Interrupted: names a process that found something else than process 0.
        """
        found = self.meeting.together(step, work)
        for number, one in enumerate(found):
            if one != found[0]:
                raise Interrupted(
                    f"{self._folder}: process {number} of {len(found)} {otherwise} process 0; give "
                    "all processes the same command and the same folders"
                )

    def name(self, number: int) -> str:
        """A name for the segment of a version, which process 0 draws."""
        mine = lambda: f"{number:06d}-{os.urandom(4).hex()}"  # noqa: E731
        return self.meeting.together("name", mine)[0]

    def segment(self, name: str, recipe: Recipe, records: list[PassageFields]) -> PassageStore:
        """A segment of new passages; no version names it yet."""

        def write(objects: Objects, shard: str, start: int, stop: int) -> ShardNote:
            return write_shard(objects, shard, records[start:stop], recipe, True)

        return self._written(name, recipe, write, len(records))

    def copy(self, name: str, store: LivingStore) -> PassageStore:
        """A segment of all living rows; nothing is tokenised."""
        made_with: Any = {
            tower: _MadeWith(store._notes(tower)["tokenizer"], store._tokens_for(tower).dtype)
            for tower in PARTS
        }

        def write(objects: Objects, shard: str, start: int, stop: int) -> ShardNote:
            records = store.passages(range(start, stop))
            tokens = {tower: ragged(store._tokens_for(tower)[start:stop]) for tower in PARTS}
            ids, lines = [one["id"] for one in records], [line_of(one) for one in records]
            return write_rows(objects, shard, ids, lines, tokens, True)

        return self._written(name, Recipe(store.config, made_with), write, store.count)

    def _written(
        self, name: str, recipe: Recipe, write: Callable[..., ShardNote], count: int
    ) -> PassageStore:
        meeting, place, every = self.meeting, segment_folder(self._folder, name), _shards(count)

        def own() -> str:
            notes = []
            for shard in every[meeting.index :: meeting.count]:
                notes.append(write(Objects(place), *shard))
                meeting.sign("segment", f"{len(notes)} shards made")
            return json.dumps(notes)

        told = [json.loads(one) for one in meeting.together("segment", own)]
        notes = [told[n % meeting.count][n // meeting.count] for n in range(len(every))]

        def whole() -> None:
            if meeting.is_first:
                complete(Objects(place), recipe, notes)
                flush_folders(place, self._folder)

        meeting.together("manifest", whole)
        return meeting.own("open", lambda: PassageStore.open(place))

    def commit(self, version: Version, dead: np.ndarray) -> Version:
        """Process 0 makes the version; all get it."""

        def make() -> str | None:
            if not self.meeting.is_first:
                return None
            commit(self._folder, version, dead)
            return json.dumps(version)

        made: Version = json.loads(self.meeting.together("version", make)[0])
        return made
