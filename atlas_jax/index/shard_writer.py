"""Makes one shard of a store: its text, its tokens, and its done-mark, which is written last."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.layouts import PassageFields
from atlas_jax.core.objects import Objects, Pending, finish
from atlas_jax.core.parts import PARTS
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.unique import hash_id
from atlas_jax.index.arrays import begin_zarr
from atlas_jax.index.line_hash import LineHash
from atlas_jax.index.shards import OFFSETS, TEXT, shard_folder
from atlas_jax.index.store_files import StoreConfig, line_of, token_dtype, token_ids

UNFINISHED = "unfinished"  # folder of what is removed when the store is whole
PREFIXES = 1 << 12  # parts of a shard's hashes that can be found at once
_BATCH = 1024  # passages per call of a tokenizer
_LONGEST_ARRAY = 1 << 40  # a shard's tokens are one chunk


class ShardNote(TypedDict):
    """A shard's done-mark.

    ``last``: no further shard of the same part of the corpus follows. ``hash``: of its lines, see
    `LineHash`. ``cut``: how many passages were too long for a tower. ``max_id``: greatest token id.
    """

    name: str
    rows: bounds.Count
    last: bool
    hash: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    cut: dict[str, bounds.Count]
    max_id: dict[str, bounds.Count]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How passages become the rows of a store.

    Attributes:
      config: formats and lengths.
      tokenizers: by tower.
    """

    config: StoreConfig
    tokenizers: Mapping[str, Tokenizer]

    def length(self, tower: str) -> int:
        """Tokens kept of a passage."""
        length: int = getattr(self.config, f"{tower}_length")
        return length

    def dtype(self, tower: str) -> np.dtype:
        """In which token ids are stored."""
        return token_dtype(self.tokenizers[tower].vocab_size)


class Tokens(TypedDict):
    """The tokens of a shard for one tower, one row behind the other.

    ``cut``: how many passages were too long.
    """

    values: np.ndarray
    lengths: np.ndarray
    cut: int


def write_shard(
    objects: Objects, name: str, records: Sequence[PassageFields], recipe: Recipe, last: bool
) -> ShardNote:
    """Tokenise passages and write them as a shard.

    Raises:
      OSError: it cannot be written.
      UserError: a tower's length is too short for any text.
    """
    towers = {tower: _tokenised(records, tower, recipe) for tower in PARTS} if records else {}
    ids = [one["id"] for one in records]
    return write_rows(objects, name, ids, [line_of(one) for one in records], towers, last)


def write_rows(
    objects: Objects,
    name: str,
    ids: Sequence[str],
    lines: Sequence[bytes],
    towers: Mapping[str, Tokens],
    last: bool,
) -> ShardNote:
    """Write rows as a shard whose tokens are there already; see `write_shard`."""
    folder = shard_folder(name)
    if lines:
        lengths = [[len(line) for line in lines], *(towers[tower]["lengths"] for tower in PARTS)]
        offsets = np.zeros((1 + len(PARTS), len(lines) + 1), np.uint64)
        np.cumsum(np.asarray(lengths, np.uint64), axis=1, out=offsets[:, 1:])

        arrays = {OFFSETS: offsets, **{tower: towers[tower]["values"] for tower in PARTS}}
        begun: list[Iterable[Pending]] = [
            begin_zarr(objects, f"{folder}/{array}", values, _LONGEST_ARRAY)
            for array, values in arrays.items()
        ]
        begun.append([objects.begin(f"{folder}/{TEXT}", b"".join(lines))])
        begun.append([objects.begin(ids_of(name), _sorted_ids(ids))])
        finish(itertools.chain(*begun))
    note = ShardNote(
        name=name,
        rows=len(lines),
        last=last,
        hash=LineHash().of(lines).hex,
        cut={tower: towers[tower]["cut"] for tower in towers},
        max_id={tower: int(towers[tower]["values"].max(initial=0)) for tower in towers},
    )
    objects.write(mark_of(name), json.dumps(note).encode())
    return note


def mark_of(name: str) -> str:
    """Name of the object that says that a shard is complete."""
    return f"{UNFINISHED}/done/{name}.json"


def ids_of(name: str) -> str:
    """Name of the temporary object with the hashes of a shard's ids, see `_sorted_ids`."""
    return f"{UNFINISHED}/ids/{name}"


def read_marks(objects: Objects) -> dict[str, ShardNote]:
    """All done-marks, by the shard's name; a shard whose mark is damaged counts as not made.

    Raises:
      UserError: the place cannot be reached.
    """
    names = objects.names(f"{UNFINISHED}/done")
    notes = {}
    for name, raw in zip(names, objects.read_all(names), strict=True):
        with contextlib.suppress(UserError):
            note: ShardNote = strict_json.parse_as(raw, ShardNote, objects.at(name))
            if mark_of(note["name"]) == name:
                notes[note["name"]] = note
    return notes


def _sorted_ids(ids: Sequence[str]) -> bytes:
    """uint32 [PREFIXES + 1], uint64 [r], uint32 [r]: hashes, ascending, and their rows.

    The first array tells where the hashes with each value of their first twelve bits begin.
    """
    hashes = np.fromiter(map(hash_id, ids), np.uint64, len(ids))
    rows = np.argsort(hashes, kind="stable")
    first = np.arange(PREFIXES, dtype=np.uint64) << np.uint64(64 - PREFIXES.bit_length() + 1)
    begin = np.append(np.searchsorted(hashes[rows], first), len(ids))
    parts = begin.astype("<u4"), hashes[rows].astype("<u8"), rows.astype("<u4")
    return b"".join(part.tobytes() for part in parts)


def read_ids(
    objects: Objects, notes: Sequence[ShardNote], first: int, last: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each shard the hashes and rows of the ids whose first twelve bits are in a range.

    Args:
      first, last: the range; the last is not in it.

    Raises:
      UserError: they are missing or damaged.
    """
    heads = objects.ranges(
        [(ids_of(note["name"]), 4 * at, 4 * at + 4) for note in notes for at in (first, last)]
    )
    ends = np.frombuffer(b"".join(heads), "<u4").reshape(-1, 2).tolist()
    wanted, head = [], 4 * (PREFIXES + 1)
    for note, (low, high) in zip(notes, ends, strict=True):
        key, rows = ids_of(note["name"]), note["rows"]
        if not low <= high <= rows:
            raise UserError(f"{objects.at(key)} is damaged; remove the unfinished store")
        tail = head + 8 * rows
        wanted.append((key, head + 8 * low, head + 8 * high))
        wanted.append((key, tail + 4 * low, tail + 4 * high))
    raw = objects.ranges(wanted)
    return [
        (np.frombuffer(hashes, "<u8"), np.frombuffer(own, "<u4"))
        for hashes, own in zip(raw[::2], raw[1::2], strict=True)
    ]


def _tokenised(records: Sequence[PassageFields], tower: str, recipe: Recipe) -> Tokens:
    tokenizer, length = recipe.tokenizers[tower], recipe.length(tower)
    values, lengths, cut = [], [], 0
    for start in range(0, len(records), _BATCH):
        rows = token_ids(records[start : start + _BATCH], tower, recipe.config, tokenizer)
        padded = tokenizer.pad_to(rows, length)
        kept = np.minimum(np.fromiter(map(len, rows), np.int64, len(rows)), length)
        values.append(padded[np.arange(length) < kept[:, None]])
        lengths.append(kept)
        cut += sum(len(row) > length for row in rows)
    return Tokens(
        values=np.concatenate(values).astype(recipe.dtype(tower)),
        lengths=np.concatenate(lengths),
        cut=cut,
    )


def ragged(padded_nl: Any) -> Tokens:
    """Tokens that were padded with 0, without the padding."""
    tokens = np.asarray(padded_nl)
    width = tokens.shape[1]
    lengths = width - np.argmax(tokens[:, ::-1] != 0, axis=1)
    lengths = np.where((tokens == 0).all(axis=1), 0, lengths)
    kept = np.arange(width) < lengths[:, None]
    return Tokens(values=tokens[kept], lengths=lengths, cut=0)
