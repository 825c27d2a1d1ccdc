"""A folder with the states that a reader's lower layers compute from the passages."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from atlas_jax.core import multihost, strict_json
from atlas_jax.core.arrays import first_not_finite
from atlas_jax.core.errors import UserError
from atlas_jax.core.types import Params
from atlas_jax.core.whole import whole_folder
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.index.embed import embedded_batches
from atlas_jax.index.files import open_npy
from atlas_jax.index.passages import PassageStore
from atlas_jax.reader import fid
from atlas_jax.reader.t5 import T5

_ARRAY, _MANIFEST = "states.npy", "states.json"
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class PassageReader:
    """The reader of the passages that are found.

    Attributes:
      reader_length, query_length: tokens of a reader input, and of its question.
    """

    model: T5
    params: Params
    reader_length: int
    query_length: int


def reader_states(
    config: CorpusConfig, store: PassageStore, reader: PassageReader
) -> np.ndarray | None:
    """Open the states in `CorpusConfig.reader_states`; compute them if they are missing.

    Returns:
      float16 [n, m * d], memory-mapped; None if no folder is bound.

    Raises:
      UserError: the reader's encoder does not read passages apart, or the folder was made from
        other passages, by another encoder or for another length.
    """
    if not config.reader_states:
        return None
    model, params = reader.model, reader.params
    if not model.config.apart_layers:
        raise UserError(
            f"CorpusConfig.reader_states = {config.reader_states!r}: only a reader with "
            "ReaderConfig.apart_layers reads passages apart from the question; bind it to ''"
        )
    folder = Path(config.reader_states)
    length = reader.reader_length - reader.query_length - 2
    wanted = _manifest(store, model, params, length)
    with multihost.first_goes_first("reader states"):
        if not (folder / _MANIFEST).exists():
            _make(folder, store, model, params, length, wanted)
    found: dict[str, Any] = strict_json.read(folder / _MANIFEST, dict[str, Any])
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"CorpusConfig.reader_states = {str(folder)!r} was made of another {name} "
                f"({found.get(name)!r}, here {value!r}); remove it, or bind another folder"
            )
    states_nf = open_npy(folder / _ARRAY, _shape(store, model, wanted), np.float16)
    at = first_not_finite(states_nf)
    if at is not None:
        row = at // states_nf.shape[1]
        raise UserError(f"{folder / _ARRAY}: row {row} is not finite; remove the folder")
    return states_nf


def _shape(store: PassageStore, reader: T5, manifest: Mapping[str, Any]) -> tuple[int, int]:
    return store.count, manifest["length"] * reader.config.emb_dim


def _manifest(store: PassageStore, reader: T5, params: Params, length: int) -> dict[str, Any]:
    """Everything that decides the states."""
    cfg = reader.config
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
    tokens = np.ascontiguousarray(store.reader_tokens_nl)
    return {
        "encoder": digest.hexdigest(),
        "passages": hashlib.sha256(tokens.data).hexdigest(),
        "length": min(length, store.reader_tokens_nl.shape[1] + 2),
    }


def _make(
    folder: Path,
    store: PassageStore,
    reader: T5,
    params: Params,
    length: int,
    manifest: dict[str, Any],
) -> None:
    encode = jax.jit(
        lambda params, tokens: fid.encode_apart(reader, params, tokens, length).astype("float16")
    )
    shape = _shape(store, reader, manifest)
    with whole_folder(folder, replace=True) as work:
        # Nothing reads the states behind the end of a passage: 0 where its batch ends, too.
        states = np.lib.format.open_memmap(work / _ARRAY, "w+", np.float16, shape)
        for rows, made in embedded_batches(
            partial(encode, params),
            store.reader_tokens_nl,
            _BATCH,
            multihost.is_first(),
            title="reader states",
        ):
            some = np.asarray(made)[: len(rows)].reshape(len(rows), -1)
            states[rows, : some.shape[1]] = some
        states.flush()
        (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
