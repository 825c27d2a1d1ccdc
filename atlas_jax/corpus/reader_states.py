"""The states that a reader's lower layers compute from the passages, kept in a folder.

    FOLDER/states.npy, states.json            of the store's first segment
    FOLDER-of-segments/NAME/...               of a segment that a later version brought

A segment never changes, so its states are computed once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from atlas_jax.core import multihost, strict_json
from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.partitioning import active_batch_parts
from atlas_jax.core.types import Params
from atlas_jax.core.whole import whole_folder
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.index.embed import embedded_batches
from atlas_jax.index.files import open_npy
from atlas_jax.index.living import LivingStore, segment_folder
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.versions import FIRST, first_is_given_up, flush_folder, unnamed
from atlas_jax.reader import fid
from atlas_jax.reader.t5 import T5

_ARRAY, _MANIFEST = "states.npy", "states.json"
_BATCH = 32
_ROWS = 1 << 16  # read at a time
_TOWER = ("encoder", "length")  # of a manifest: what all segments have in common


@dataclasses.dataclass(frozen=True)
class PassageReader:
    """The reader of a run, and the lengths at which it reads.

    Attributes:
      reader_length, query_length: tokens of a reader input, and of its question.
    """

    model: T5
    params: Params
    reader_length: int
    query_length: int


def reader_states(config: CorpusConfig, reader: PassageReader) -> "ReaderStates | None":
    """The states in `CorpusConfig.reader_states`; None if no folder is bound.

    Raises:
      UserError: the reader's encoder does not read passages apart.
    """
    if not config.reader_states:
        return None
    if not reader.model.config.apart_layers:
        raise UserError(
            f"CorpusConfig.reader_states = {config.reader_states!r}: only a reader with "
            "ReaderConfig.apart_layers reads passages apart from the question; bind it to ''"
        )
    return ReaderStates(Path(config.reader_states), reader)


class ReaderStates:
    """States of passages, computed where they are missing."""

    def __init__(self, folder: Path, reader: PassageReader) -> None:
        """Compile and read nothing yet; the mesh is the active one."""
        self._folder, self._reader = folder, reader
        parts = active_batch_parts()
        self._few, self._many = parts, -(-_BATCH // parts) * parts
        self._opened: dict[str, np.ndarray] = {}
        self._length = length = reader.reader_length - reader.query_length - 2
        self._encode: Callable[[Params, np.ndarray], jax.Array] = jax.jit(
            lambda params, tokens_nl: fid.encode_apart(
                reader.model, params, tokens_nl, length
            ).astype("float16")
        )

    def of(self, store: PassageStore) -> Any:
        """The states of all rows of a store.

        Returns:
          float16 [n, m * d], read when they are asked for.

        Raises:
          UserError: the folder was made from other passages, by another encoder or for another
            length.
        """
        if not isinstance(store, LivingStore):
            return self.of_segment(store, FIRST)
        pairs = zip(store.version["segments"], store.segments, strict=True)
        return store.view([self.of_segment(segment, name) for name, segment in pairs])

    def of_segment(self, segment: PassageStore, name: str) -> np.ndarray:
        """The states of one segment, memory-mapped; see `of`. All processes must call it."""
        if name not in self._opened:
            folder, wanted = _folder_of(self._folder, name), self._manifest(segment)
            meeting = Meeting(f"reader states {folder}")
            there = lambda: "there" if (folder / _MANIFEST).exists() else None  # noqa: E731
            if not all(meeting.together("look", there)):
                self._make(meeting, folder, segment, wanted)
            self._opened[name] = meeting.own("open", lambda: self._open(folder, segment, wanted))
        return self._opened[name]

    def _open(self, folder: Path, segment: PassageStore, wanted: Mapping[str, Any]) -> np.ndarray:
        found: dict[str, Any] = strict_json.read(folder / _MANIFEST, dict[str, Any])
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"CorpusConfig.reader_states = {str(folder)!r} was made of another {name} "
                    f"({found.get(name)!r}, here {value!r}); remove it, or bind another folder"
                )
        states_nf = open_npy(folder / _ARRAY, self._shape(segment, wanted), np.float16)
        at = first_not_finite(states_nf)
        if at is not None:
            row = at // states_nf.shape[1]
            raise UserError(f"{folder / _ARRAY}: row {row} is not finite; remove the folder")
        return states_nf

    def _shape(self, segment: PassageStore, manifest: Mapping[str, Any]) -> tuple[int, int]:
        return segment.count, manifest["length"] * self._reader.model.config.emb_dim

    def _manifest(self, segment: PassageStore) -> dict[str, Any]:
        """Everything that decides the states."""
        return {
            "encoder": self._encoder_hash,
            "passages": _hash_of(segment),
            "length": min(self._length, segment.reader_tokens_nl.shape[1] + 2),
        }

    @functools.cached_property
    def _encoder_hash(self) -> str:
        cfg, params = self._reader.model.config, self._reader.params
        digest = hashlib.sha256(f"{cfg.start_id} {cfg.num_heads} {cfg.dtype}".encode())
        encoder = params["encoder"]
        lower = {
            "token_embedder": params["token_embedder"],
            "embeddings": encoder["embeddings"],
            **{f"layers_{i}": encoder[f"layers_{i}"] for i in range(cfg.apart_layers)},
        }
        for name, leaf in sorted(traverse_util.flatten_dict(lower, sep="/").items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(multihost.to_host(leaf)).data)
        return digest.hexdigest()

    def _make(
        self, meeting: Meeting, folder: Path, segment: PassageStore, manifest: Mapping[str, Any]
    ) -> None:
        """Compute the states with the devices of all processes; process 0 writes them."""
        shape = self._shape(segment, manifest)
        # Few passages in a batch of many would be mostly padding.
        is_few = segment.count <= self._many // 4
        batches = embedded_batches(
            functools.partial(self._encode, self._reader.params),
            segment.reader_tokens_nl,
            self._few if is_few else self._many,
            meeting.is_first and not is_few,
            title="reader states",
        )
        written: list[tuple[Path, Any]] = []
        with contextlib.ExitStack() as held:

            def begin() -> None:
                if meeting.is_first:
                    work = held.enter_context(whole_folder(folder, replace=True))
                    # Nothing reads the states behind the end of a passage: 0 where its batch ends.
                    states = np.lib.format.open_memmap(work / _ARRAY, "w+", np.float16, shape)
                    written.append((work, states))

            meeting.together("begin", begin)
            for rows, made in batches:
                rows = rows[rows >= 0]
                some = np.asarray(multihost.to_host(made))[: len(rows)].reshape(len(rows), -1)
                for _, states in written:
                    states[rows, : some.shape[1]] = some

            def end() -> None:
                for work, states in written:
                    states.flush()
                    _write_manifest(work, manifest)
                held.close()

            meeting.together("end", end)


def save_compacted(directory: str | os.PathLike[str], name: str, store: LivingStore) -> None:
    """Copy the states of the living rows, for the segment that `compact` writes.

    Nothing is copied if a segment's states are missing: they are computed when they are needed.

    Raises:
      UserError: the segments' states are not of one reader, or of other passages.
    """
    folders = [_folder_of(Path(directory), one) for one in store.version["segments"]]
    if not all((folder / _MANIFEST).exists() for folder in folders):
        return
    manifests, arrays = list[list[Any]](), []
    for folder, one in zip(folders, store.segments, strict=True):
        found: dict[str, Any] = strict_json.read(folder / _MANIFEST, dict[str, Any])
        tower = [found.get(field) for field in _TOWER]
        if found.get("passages") != _hash_of(one) or manifests and tower != manifests[0]:
            raise UserError(
                f"{folder} has states of another reader or of other passages; remove it, then "
                "compact again"
            )
        manifests.append(tower)
        width = np.load(folder / _ARRAY, mmap_mode="r").shape[1]
        arrays.append(open_npy(folder / _ARRAY, (one.count, width), np.float16))
    segment = PassageStore.open(segment_folder(store.directory, name))
    told = {**dict(zip(_TOWER, manifests[0], strict=True)), "passages": _hash_of(segment)}
    with whole_folder(_folder_of(Path(directory), name), replace=True) as work:
        np.save(work / _ARRAY, np.asarray(store.view(arrays)))
        _write_manifest(work, told)


def remove_unnamed(directory: Path, store: LivingStore) -> None:
    """Remove the states of segments that no version of the store names."""
    folder = _folder_of(directory, "-").parent
    for path in unnamed(store.directory, folder.iterdir() if folder.is_dir() else ()):
        shutil.rmtree(path, ignore_errors=True)
    if first_is_given_up(store.directory):
        shutil.rmtree(directory, ignore_errors=True)


def _folder_of(directory: Path, name: str) -> Path:
    """Where the states of a segment lie, or are to lie."""
    beside = directory.with_name(f"{directory.name}-of-segments")
    return directory if name == FIRST else beside / name


def _hash_of(segment: PassageStore) -> str:
    digest = hashlib.sha256()
    for start in range(0, segment.count, _ROWS):
        tokens = segment.reader_tokens_nl[start : start + _ROWS]
        digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()


def _write_manifest(work: Path, manifest: Mapping[str, Any]) -> None:
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    flush_folder(work)
