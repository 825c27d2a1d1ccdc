"""Describe a saved index from its own files."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atlas_jax.index.int8 import as_floats
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.recall_notes import line_of, recall_notes
from atlas_jax.index.saved import check_store, open_index
from atlas_jax.index.versions import Version, first_version, numbers_of, read_version, versions_of

_CHUNK_NUMBERS = 1 << 22  # read at a time


def describe(
    directory: str | os.PathLike[str], store: str | os.PathLike[str] = ""
) -> dict[str, Any]:
    """Describe an index as JSON values; all of it is read once.

    Args:
      directory: of the index.
      store: directory of a passage store; checks that the index was made from it.

    Returns:
      ``index``, ``count``, ``width``, ``dtype``, ``version``, ``encoder_hash`` and
      ``store_hash`` as the index says; ``bytes`` of its files; ``norms``, the smallest, mean and
      largest length of an embedding (None without any that is finite); ``not_finite``, the first
      rows with a NaN or an infinity, and ``not_finite_count``, how many there are; ``recall``,
      what runs found of it, see `recall_notes`; with a store also ``store``.

    Raises:
      UserError: there is no index, it is damaged, or it was made from another store.
    """
    opened = open_index(directory)
    found: dict[str, Any] = {
        "index": str(directory),
        **{
            name: opened.manifest[name]
            for name in ("count", "width", "dtype", "version", "encoder_hash", "store_hash")
        },
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(opened.embeddings_ne)),
    }
    by = found["encoder_hash"]
    notes = recall_notes(directory)
    found["recall"] = [dict(one) for one in notes if one["encoder_hash"] == by]
    if store:
        made = LivingStore.as_of(store)
        ours = (one for one in made.segments if one.retriever_hash == opened.manifest["store_hash"])
        check_store(directory, opened.manifest, next(ours, made))
        found["store"] = str(made.directory)
    return found | _lengths(opened.embeddings_ne)


def lines_of(found: dict[str, Any]) -> list[str]:
    """The result of `describe` as lines of text."""
    norms, broken = found["norms"], found["not_finite_count"]
    lines = [
        f"{found['index']}: {found['count']:,} passages, {found['width']} numbers each, "
        f"{found['dtype']}, {found['bytes'] / 2**20:,.1f} MiB",
        f"refreshed {found['version']} times",
        f"passage encoder {found['encoder_hash'][:12]}, passages {found['store_hash'][:12]}"
        + (f": those of {found['store']}" if "store" in found else ""),
    ]
    if norms is not None:
        low, mean, high = norms
        lines.append(f"lengths of the embeddings: {low:.4g} to {high:.4g}, mean {mean:.4g}")
    lines += [line_of(one) for one in found["recall"]]
    if broken:
        rows = ", ".join(map(str, found["not_finite"]))
        lines.append(f"{broken:,} rows are not finite: {rows}{', ...' if broken > 10 else ''}")
    return lines


def describe_versions(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The versions of a passage store as JSON values, oldest first; see `versions.Version`.

    Raises:
      UserError: there is no store, or it is damaged.
    """
    folder = Path(directory)
    versions = versions_of(folder)
    if not versions or not versions[-1]["oldest"]:
        versions = [first_version(PassageStore.open(folder).count), *versions]
    return {"store": str(directory), "versions": [dict(one) for one in versions]}


def recent_versions(
    directory: str | os.PathLike[str], before: int, most: int
) -> tuple[list[Version], int]:
    """The newest versions of a store, newest first; only their own files are read.

    Args:
      before: only versions below this number; 0 = all.
      most: how many.

    Returns:
      The versions, and the number of the oldest one that was kept.

    Raises:
      UserError: the store is damaged.
    """
    numbers = numbers_of(directory)
    kept = numbers if numbers and read_version(directory, numbers[-1])["oldest"] else [0, *numbers]
    chosen = [one for one in reversed(kept) if not before or one < before][:most]
    found = [
        read_version(directory, one) if one else first_version(PassageStore.open(directory).count)
        for one in chosen
    ]
    return found, kept[0]


def lines_of_versions(found: dict[str, Any]) -> list[str]:
    """The result of `describe_versions` as lines of text."""
    lines = []
    for one in found["versions"]:
        changed = [f"{number:,} {what}" for what, number in one["change"].items() if number]
        what = ", ".join(changed) or ("compacted" if one["version"] else "as built")
        segments = f"{len(one['segments'])} segment{'s' * (len(one['segments']) > 1)}"
        when = f", {one['time'][:19]}Z" if one["time"] else ""
        lines.append(
            f"version {one['version']}{when}: {one['count']:,} passages, {segments}; {what}"
        )
    return [found["store"], *lines]


def _lengths(embeddings_ne: Any) -> dict[str, Any]:
    count, width = embeddings_ne.shape
    step = max(1, _CHUNK_NUMBERS // width)
    total, low, high, broken = 0.0, np.inf, 0.0, []
    for start in range(0, count, step):
        part = jax.tree.map(lambda x, start=start: x[start : start + step], embeddings_ne)
        floats_ne = np.asarray(as_floats(part), np.float32)
        norms_n = np.linalg.norm(floats_ne.astype(np.float64), axis=1)
        is_finite_n = np.isfinite(norms_n)
        broken += (start + np.flatnonzero(~is_finite_n)).tolist()
        norms_n = norms_n[is_finite_n]
        total += float(norms_n.sum())
        low = min(low, float(norms_n.min(initial=np.inf)))
        high = max(high, float(norms_n.max(initial=0.0)))
    finite = count - len(broken)
    return {
        "norms": [low, total / finite, high] if finite else None,
        "not_finite": broken[:10],
        "not_finite_count": len(broken),
    }
