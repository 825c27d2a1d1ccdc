"""An index takes hardly more memory while it is loaded than on the devices, also in segments."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.index.changes import Batch, change
from atlas_jax.index.living import LivingStore
from atlas_jax.index.new_index import new_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.segment_indices import folder_of
from tests.index.test_living import built, towers  # noqa: F401  (a fixture)

# Anonymous memory, looked at all the time: the pages of a file that is read through a map count as
# the process's too, but the kernel takes them whenever it needs room.
LOAD = """
import re, sys, threading, time
import jax, numpy as np
from atlas_jax.index.living import LivingStore
from atlas_jax.index.placement import to_device
from atlas_jax.index.segment_indices import load_embeddings
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def load(store, index):
    store = LivingStore.as_of(store)
    found = load_embeddings(index, store, "e")
    return jax.block_until_ready(to_device(found.embeddings_ne, store, retriever_tokens=False))
load(*sys.argv[1:3])  # what is needed at any size
before = peak = held()
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
index = load(*sys.argv[3:5])
print((peak - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(index)))
"""


def texts(first: int, count: int) -> list[dict[str, str]]:
    return [
        {"id": f"p{i}", "title": "", "section": "", "text": f"w {i % 999}"}
        for i in range(first, first + count)
    ]


def save(place: Path, store: PassageStore, width: int) -> None:
    with new_index(place, store, "e", width) as out:
        for start in range(0, store.count, 4096):
            stop = min(start + 4096, store.count)
            out[start:stop] = np.full((stop - start, width), start, np.float32)


def made(folder: Path, rows: int, width: int, segments: int, towers) -> list[str]:  # noqa: F811
    """Store and index of so many rows, which came in so many changes; a few of them are deleted."""
    folder.mkdir()
    directory, index = built(folder, texts(0, rows // segments), towers), folder / "index"
    save(index, LivingStore.as_of(directory), width)
    for number in range(1, segments):
        batch = Batch(
            add=texts(number * (rows // segments), rows // segments), delete=[f"p{number}"]
        )
        change(
            directory,
            batch,
            towers,
            lambda name, segment, now: save(folder_of(index, segment, name), segment, width),
        )
    return [str(directory), str(index)]


def grown(folder: Path, rows: int, width: int, segments: int, towers) -> float:  # noqa: F811
    """By how many times its size on the devices a process grows that loads it."""
    few = made(folder / "few", 64, width, segments, towers)
    many = made(folder / "many", rows, width, segments, towers)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *few, *many],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [1, 3])
def test_loading_takes_little_more_than_what_is_loaded(
    tmp_path: Path,
    towers,  # noqa: F811
    segments: int,
) -> None:
    """138 MB; a copy of a third of it would be too much."""
    assert 0.9 < grown(tmp_path, 16_800, 2048, segments, towers) < 1.2
