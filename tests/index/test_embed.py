"""Embedding a corpus: order, lengths, streaming."""

import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.index import embed
from atlas_jax.index.embed import LENGTH_STEP, embed_corpus


def corpus(n, m=64, seed=0):
    rng = np.random.default_rng(seed)
    tokens_nm = rng.integers(1, 100, (n, m)).astype(np.uint16)
    return np.where(np.arange(m) < rng.integers(1, m + 1, n)[:, None], tokens_nm, 0).astype(
        np.uint16
    )


@jax.jit
def embed_fn(tokens_nm):
    """Depends on every token and its position, not on padding."""
    position_1m = jnp.arange(1, tokens_nm.shape[1] + 1)[None]
    return jnp.stack([tokens_nm.sum(1), (tokens_nm * position_1m).sum(1)], 1).astype(jnp.float32)


@pytest.mark.parametrize("n", [1, 7, 8, 50])
def test_rows_keep_their_order(n, monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 20)
    tokens_nm = corpus(n)
    got = embed_corpus(embed_fn, tokens_nm, batch_size=8, progress=False)
    np.testing.assert_array_equal(got, embed_fn(tokens_nm.astype(np.int32)))


def test_short_passages_are_not_padded_to_the_longest():
    shapes = []

    def spy(tokens):
        shapes.append(tokens.shape)
        return embed_fn(tokens)

    tokens_nm = corpus(400, m=100)
    embed_corpus(spy, tokens_nm, batch_size=8, progress=False)
    lengths = [length for _, length in shapes]
    assert {rows for rows, _ in shapes} == {8}
    assert all(length % LENGTH_STEP == 0 or length == 100 for length in lengths)
    assert lengths == sorted(lengths, reverse=True)
    real = (tokens_nm != 0).sum()
    assert 8 * sum(lengths) < real + 400 * (LENGTH_STEP + 4)
    shapes.clear()
    for few in range(1, 30):  # changes of an index: of any length, and few programs for all
        embed_corpus(spy, corpus(few, m=100, seed=few), batch_size=8, progress=False)
    assert {length for _, length in shapes} <= {8, 16, 32, 64, 100}


def test_padding_inside_a_text_cuts_nothing_off():
    tokens_nm = np.array([[5, 0, 7, 0], [0, 0, 0, 0]], np.uint16)
    got = embed_corpus(embed_fn, tokens_nm, batch_size=2, progress=False)
    np.testing.assert_array_equal(got, [[12, 26], [0, 0]])


def test_out_takes_the_embeddings(tmp_path):
    tokens_nm = corpus(30)
    out = np.lib.format.open_memmap(tmp_path / "e.npy", "w+", jnp.bfloat16, (30, 2))
    assert embed_corpus(embed_fn, tokens_nm, 8, out=out, progress=False) is out
    want = np.asarray(embed_fn(tokens_nm.astype(np.int32)).astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), want.view(np.uint16))
    with pytest.raises(ValueError, match="out is"):
        embed_corpus(embed_fn, tokens_nm, 8, out=np.zeros((30, 3)), progress=False)
    with pytest.raises(ValueError, match="no passages"):
        embed_corpus(embed_fn, tokens_nm[:0], 8, progress=False)


@pytest.mark.parametrize("done", [(), (0,), (0, 2), (0, 1, 2)])
def test_chunks_that_are_there_are_left_out(done, monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 20)
    tokens_nm, out = corpus(50), np.full((50, 2), -1.0, np.float32)
    embed_corpus(embed_fn, tokens_nm, 8, out, progress=False, done=done)
    chunk = embed.chunk_rows(50, 1)
    assert chunk == 17
    want = np.array(embed_fn(tokens_nm.astype(np.int32)))
    for number in done:
        want[number * chunk : (number + 1) * chunk] = -1
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("n", [1, 3, 50, 200])
@pytest.mark.parametrize("fed", [(0, 1, 2, 3), (1, 3), (2,)])
def test_parts_feed_and_keep_their_own_chunks(n, fed, monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 20)
    tokens_nm, shapes = corpus(n), []

    def spy(tokens):
        shapes.append(tokens.shape)
        return embed_fn(tokens)

    out = np.full((n, 2), -1.0, np.float32)
    embed_corpus(spy, tokens_nm, 16, out, False, parts=embed.Parts(4, fed, fed))
    chunk = embed.chunk_rows(n, 4)
    own = np.isin(np.arange(n) // chunk % 4, fed)
    np.testing.assert_array_equal(out[own], embed_fn(tokens_nm.astype(np.int32))[own])
    assert (out[~own] == -1).all()
    assert {rows for rows, _ in shapes} == {4 * len(fed)}
    # All processes run programs of the same lengths, in the same order.
    again, shapes[:] = list(shapes), []
    embed_corpus(spy, tokens_nm, 16, np.empty((n, 2)), False, parts=embed.Parts(4, (0,), (0,)))
    assert [length for _, length in shapes] == [length for _, length in again]


def test_several_processes_compute_everything_before_one_tells_a_fault(monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 8)
    calls = []

    def broken(tokens):
        calls.append(tokens)
        return np.full((len(tokens), 2), np.nan, np.float32)

    for parts, want in ((embed.Parts(), 2), (embed.Parts(2, (0,), (0,)), 4)):
        calls.clear()
        with pytest.raises(UserError, match="passage .* embedding that is not finite"):
            embed_corpus(broken, corpus(30), 4 * parts.count, progress=False, parts=parts)
        assert len(calls) >= want and (parts.count == 2) == (len(calls) > 3)


@pytest.mark.parametrize("n", [1, 16, 50])
def test_batches_side_by_side_keep_their_order_and_compile_once(n, monkeypatch):
    monkeypatch.setattr(embed, "WINDOW", 20)
    tokens_nm, traced = corpus(n), []

    @jax.jit
    def counted(tokens_nm):
        traced.append(tokens_nm.shape)
        return embed_fn(tokens_nm)

    got = embed_corpus(counted, tokens_nm, 4, progress=False, at_a_time=3)
    np.testing.assert_array_equal(got, embed_fn(tokens_nm.astype(np.int32)))
    assert len(traced) == len(set(traced))


def test_they_do_run_side_by_side():
    both = threading.Barrier(2)

    def meeting(tokens):
        both.wait(timeout=60)  # nobody would come
        return embed_fn(tokens)

    assert embed_corpus(meeting, corpus(32), 8, progress=False, at_a_time=2).shape == (32, 2)


def test_what_goes_wrong_in_one_of_them_is_raised():
    def broken(tokens):
        if tokens.shape[1] < 32:
            raise MemoryError("too little")
        return embed_fn(tokens)

    with pytest.raises(MemoryError, match="too little"):
        embed_corpus(broken, corpus(50), 4, progress=False, at_a_time=2)


# Anonymous memory, looked at all the time: the pages of a written map count as the process's
# too, but the kernel takes them whenever it needs room.
PEAK_SCRIPT = """
import re, sys, threading, time, types
import jax, jax.numpy as jnp, numpy as np
from atlas_jax.index import embed
from atlas_jax.index.new_index import shared_index
width, embed.WINDOW = 256, 2048
encode = jax.jit(lambda tokens: tokens[:, :1] * jnp.ones(width))
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def build(rows):
    store = types.SimpleNamespace(count=rows, retriever_hash="passages")
    tokens_nm = np.ones((rows, 8), np.uint16)
    with shared_index(f"{sys.argv[1]}/{rows}", store, "encoder", width, chunk=2048) as made:
        embed.embed_corpus(encode, tokens_nm, 256, made.embeddings_ne, False, made.done)
build(2048)  # what is needed at any size
before = peak = held()
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
rows = 256 * 2048
build(rows)
print((peak - before) / (rows * width * 4))
"""


@pytest.mark.slow
def test_writing_an_index_takes_a_fraction_of_it_in_memory(tmp_path):
    """Neither an index of 537 MB in 256 chunks nor a part that grows with it is held.

    What does not grow, chunks under way and what the allocator keeps, is 30 to 40 MB.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


class Promise:
    """An array under way; `under_way` holds those that nothing has waited for."""

    shape = (4, 2)

    def __init__(self, under_way):
        under_way.add(self)
        self.under_way = under_way

    def block_until_ready(self):
        self.under_way.discard(self)
        return self


def test_who_drops_the_embeddings_runs_no_more_than_one_batch_ahead():
    under_way, most = set(), []

    def begin(tokens):
        promise = Promise(under_way)
        most.append(len(under_way))
        return promise

    for _, embedded in embed.embedded_batches(begin, corpus(400), 4, progress=False):
        assert embedded not in under_way
    assert len(most) == 100
    assert max(most) == 2
    assert not under_way
