"""Writes stores and indices of format 1, as earlier versions did."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from atlas_jax.core.unique import hash_id
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import open_index
from atlas_jax.index.store_files import content_hashes, line_of


def write_flat(store: PassageStore, folder: Path) -> Path:
    """Write the content of a store in format 1."""
    folder.mkdir()
    records = store.passages(range(store.count))
    lines = [line_of(one) for one in records]
    (folder / "passages.jsonl").write_bytes(b"".join(lines))
    hashes = np.array([hash_id(one["id"]) for one in records], np.uint64)
    rows = np.argsort(hashes, kind="stable")
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, lines)]).astype(np.uint64))
    np.save(folder / "id_hashes.npy", hashes[rows])
    np.save(folder / "id_rows.npy", rows)
    np.save(folder / "reader_tokens.npy", np.asarray(store.reader_tokens_nl))
    np.save(folder / "retriever_tokens.npy", np.asarray(store.retriever_tokens_nm))
    made_with = {tower: store.manifest[tower]["tokenizer"] for tower in ("reader", "retriever")}
    corpus_hash = hashlib.sha256(b"".join(lines)).hexdigest()
    manifest = {
        **{name: store.manifest[name] for name in ("count", "reader", "retriever")},
        **content_hashes(corpus_hash, store.config, made_with, 1),
        "format": 1,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_flat_index(index: Path, folder: Path) -> Path:
    """Write the content of an index in format 1."""
    folder.mkdir()
    found = open_index(index)
    name = f"{found.manifest['embeddings']}.npy"
    rows = [np.asarray(leaf) for leaf in jax.tree.leaves(found.embeddings_ne)]
    if found.manifest["dtype"] == "bfloat16":
        rows[0] = rows[0].view(np.uint16)
    for array, file in zip(rows, (name, name.replace(".npy", ".scales.npy")), strict=False):
        np.save(folder / file, array)
    told = {key: value for key, value in found.manifest.items() if key != "chunk"}
    (folder / "index.json").write_text(json.dumps({**told, "format": 1, "embeddings": name}))
    return folder
