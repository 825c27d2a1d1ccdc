"""Change a passage store: every batch of changes makes one version, whole or not at all."""

import collections
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.layouts import PassageFields
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
) -> LivingStore:
    """Make the next version of a store.

    Args:
      directory: of the store.
      tokenizers: of "reader" and "retriever"; only the new passages are tokenised. Not needed
        where passages are only deleted.
      embed: called before the version exists, with the new segment if there is one, and with the
        store as it is before the change.
      after: the version that is to be changed; None = the newest.
      opened: segments that were opened with these tokenizers before.

    Returns:
      The store as of the new version.

    Raises:
      UserError: an unknown or taken id, a passage at fault, other tokenizers than the store's,
        another process that changes it, or a disk that cannot be written. The store is then
        unchanged.
    """
    folder = place_of(directory)
    made_with: Any = {f"{tower}_tokenizer": one for tower, one in tokenizers.items()}
    # Refuses other tokenizers.
    opened = LivingStore.as_of(folder, "", **made_with, opened=opened).segments
    added, replaced = batch.records()
    try:
        with changing(folder):
            now = LivingStore.as_of(folder, opened=opened)
            if after not in (None, now.version["version"]):
                raise UserError(
                    f"{folder} is at version {now.version['version']}, but version {after} is "
                    "loaded here; load the newest one to change it"
                )
            gone = _rows(now, added, replaced, batch.delete)
            dead = np.sort(np.concatenate([_dead(now), now.places_n[gone]]))
            names, number = list(now.version["segments"]), now.version["version"] + 1
            segments = list(now.segments)
            count = now.count - len(gone) + len(added) + len(replaced)
            if count < 1:
                raise UserError(f"delete: {folder} would hold no passage; keep one")
            if added or replaced:
                names.append(name := _new_name(number))
                new = _write_segment(folder, name, [*added, *replaced], now, tokenizers)
                embed(name, new, now)
                segments.append(new)
            told = Change(added=len(added), replaced=len(replaced), deleted=len(batch.delete))
            version = _version(now.version, names, dead, count, told)
            commit(folder, version, dead)
            return LivingStore.of(folder, version, segments, dead)
    except OSError as error:
        raise unwritten(directory, error) from error


def compact(
    directory: str | os.PathLike[str],
    keep: int = 1,
    embed: Callable[[str, LivingStore], None] = lambda name, store: None,
) -> LivingStore:
    """Write the living passages as one segment, and give up all but the newest versions.

    Args:
      keep: versions that can still be read, this one among them.
      embed: called before the version exists with the store that it copies.

    Raises:
      UserError: as `change`.
    """
    if keep < 1:
        raise UserError(f"keep = {keep}: keep 1 version or more")
    folder = place_of(directory)
    LivingStore.as_of(folder)
    try:
        with changing(folder):
            now = LivingStore.as_of(folder)
            names, number = list(now.version["segments"]), now.version["version"] + 1
            if not now.is_plain:
                names = [_new_name(number)]
                _copy_segment(folder, names[0], now)
                embed(names[0], now)
            told = Change(added=0, replaced=0, deleted=0)
            dead = np.zeros(0, np.int64)
            version = _version(now.version, names, dead, now.count, told)
            version["oldest"] = max(now.version["oldest"], number - keep + 1)
            commit(folder, version, dead)
            collect(folder)
            return LivingStore.as_of(folder)
    except OSError as error:
        raise unwritten(directory, error) from error


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


def _new_name(number: int) -> str:
    return f"{number:06d}-{os.urandom(4).hex()}"


def _write_segment(
    directory: Path,
    name: str,
    records: list[PassageFields],
    store: LivingStore,
    tokenizers: Mapping[str, Tokenizer],
) -> PassageStore:
    recipe = Recipe(store.config, tokenizers)

    def write(objects: Objects) -> list[ShardNote]:
        starts = range(0, len(records), SHARD_ROWS)
        return [
            write_shard(objects, f"00000-{n:05d}", records[at : at + SHARD_ROWS], recipe, True)
            for n, at in enumerate(starts)
        ]

    return _written(directory, name, recipe, write)


def _copy_segment(directory: Path, name: str, store: LivingStore) -> None:
    """Write all living rows as a segment; nothing is tokenised."""
    made_with: Any = {
        tower: _MadeWith(store._notes(tower)["tokenizer"], store._tokens_for(tower).dtype)
        for tower in PARTS
    }

    def write(objects: Objects) -> list[ShardNote]:
        notes = []
        for number, start in enumerate(range(0, store.count, SHARD_ROWS)):
            end = min(start + SHARD_ROWS, store.count)
            records = store.passages(range(start, end))
            tokens = {tower: ragged(store._tokens_for(tower)[start:end]) for tower in PARTS}
            ids, lines = [one["id"] for one in records], [line_of(one) for one in records]
            notes.append(write_rows(objects, f"00000-{number:05d}", ids, lines, tokens, True))
        return notes

    _written(directory, name, Recipe(store.config, made_with), write)


@dataclass(frozen=True)
class _MadeWith:
    """What a manifest says of a tokenizer that is not at hand."""

    content_hash: str
    dtype: np.dtype

    @property
    def vocab_size(self) -> int:
        """The largest vocabulary whose ids fit into the type of the stored tokens."""
        return int(np.iinfo(self.dtype).max)


def _written(
    directory: Path, name: str, recipe: Recipe, write: Callable[[Objects], list[ShardNote]]
) -> PassageStore:
    """A segment made of new shards; no version names it yet."""
    place = segment_folder(directory, name)
    complete(Objects(place), recipe, write(Objects(place)))
    flush_folders(place, directory)
    return PassageStore.open(place)
