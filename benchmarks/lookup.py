"""What drafts from the passages (`GenerationConfig.lookup_tokens`) save or cost when answering.

    python -m benchmarks.lookup --model work/mini [--k 1,4] [--rows 1,8] [--drafts 2,4]

Factbook questions are read with their gold passage and others of the same title, by a model folder
or, without --model, by the shipped nano pair. Greedy decoding and each number of drafted tokens
write the same answers in turns, from the same encoded passages; that they are equal is checked. A
row tells the seconds of encoding and of greedy writing, and how many times as fast the drafts are.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import atlas_jax
from atlas_jax.answering.answers import Reading, encoded, joined
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.evaluation import make_evaluation
from atlas_jax.core import partitioning
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.core.types import Array, Batch, Params, Passages
from atlas_jax.demo import factbook
from atlas_jax.demo.paths import nano_checkpoint
from atlas_jax.reader import fid
from atlas_jax.reader.generate import Generated, GenerationConfig, generate
from atlas_jax.reader.t5 import T5

ROUNDS = 5
Source = tuple[Array, Array, Array]  # states, mask and tokens of the passages as one source


def asked(folder: Path, count: int) -> Path:
    """Write dev questions with up to eight passages, the gold one first; returns the file."""
    factbook.prepare(folder)
    passages = [row for _, row in read_jsonl(folder / "passages.jsonl")]
    questions = [row for _, row in read_jsonl(folder / "dev.jsonl")]
    by_title: dict[str, list[dict[str, Any]]] = {}
    for passage in passages:
        by_title.setdefault(passage["title"], []).append(passage)
    rows = []
    for question in questions[:: max(1, len(questions) // count)][:count]:
        own = by_title[question["title"]]
        gold = [p for p in own if p["id"] in question["gold"]]
        rows.append({**question, "passages": [*gold, *(p for p in own if p not in gold)][:8]})
    file = folder / "asked.jsonl"
    write_jsonl(file, rows)
    return file


def writer(reader: T5, config: GenerationConfig) -> Callable[[Params, Source], Generated]:
    """The compiled writing of answers from encoded passages."""

    @jax.jit
    def write(params: Params, source: Source) -> Generated:
        enc_bsd, mask_bs, copyable_bs = source
        return generate(reader, params["reader"], enc_bsd, mask_bs, config, copyable_bs=copyable_bs)

    return write


def measure(atlas: Atlas, file: Path, k: int, rows: int, drafts: Sequence[int]) -> dict[str, Any]:
    """Seconds by what was done, the best of several rounds, and tokens for each decoder call."""
    made, told = atlas.made, atlas.told
    evaluation = dataclasses.replace(
        told.evaluation, file=str(file), passages="file", k=k, batch_size=rows, loss="none",
        recall_at=(1,),
    )  # fmt: skip
    reader, reading = made.models.reader, Reading(k, told.read.reader_length)
    with partitioning.activate(made.mesh, made.rules):
        run = make_evaluation(
            dataclasses.replace(told, evaluation=evaluation), made.models, made.tokenizers, None,
            made.mesh, made.rules,
        )  # fmt: skip
        ev, params = run.evaluator, made.params
        found = []
        for at in range(0, len(run.examples), rows):
            batch = ev.batcher(run.examples[at : at + rows], rows)
            found.append((batch, ev.find(params, ev.source.of_batch(params, batch), batch)))

        @jax.jit
        def encode(params: Params, batch: Batch, passages: Passages) -> Source:
            tokens_bkl = joined(reader, params, batch, passages, reading)
            enc_bkld = encoded(reader, params, tokens_bkl, passages, reading)
            return fid.fuse(reader, enc_bkld, tokens_bkl)

        sources = [encode(params, *one) for one in found]
        writers = {
            d: writer(reader, dataclasses.replace(told.generation, lookup_tokens=d))
            for d in (0, *drafts)
        }
        texts = {
            d: jax.device_get([write(params, one) for one in sources])
            for d, write in writers.items()
        }
        seconds: dict[Any, float] = {}
        for _ in range(ROUNDS):
            _timed(seconds, "encode", lambda: [encode(params, *one) for one in found])
            for d, write in writers.items():
                _timed(seconds, d, partial(_all_written, write, params, sources))
    for d in drafts:
        for one, plain in zip(texts[d], texts[0], strict=True):
            np.testing.assert_array_equal(one.tokens_bt, plain.tokens_bt)
    written = sum(np.count_nonzero(one.tokens_bt) for one in texts[0])
    return {
        "seconds": seconds,
        "per call": {d: written / sum(one.calls_b.sum() for one in texts[d]) for d in texts},
    }


def _all_written(write: Any, params: Params, sources: list[Source]) -> list[Any]:
    return [write(params, one) for one in sources]


def _timed(seconds: dict[Any, float], name: Any, work: Callable[[], Any]) -> None:
    start = time.perf_counter()
    jax.block_until_ready(work())
    seconds[name] = min(time.perf_counter() - start, seconds.get(name, np.inf))


def main() -> None:
    """Print a line for each number of passages, rows and drafted tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=nano_checkpoint(), help="model folder")
    parser.add_argument("--count", type=int, default=64, help="questions")
    for name, default in (("k", "1,4"), ("rows", "1,8"), ("drafts", "2,4")):
        parser.add_argument(f"--{name}", default=default, help="numbers, with commas between")
    told = parser.parse_args()
    ks, rows, drafts = (
        [int(number) for number in told_numbers.split(",")]
        for told_numbers in (told.k, told.rows, told.drafts)
    )
    with tempfile.TemporaryDirectory() as folder:
        file = asked(Path(folder), told.count)
        atlas = atlas_jax.load(told.model)
        print("| k | rows | encode s | greedy s | drafted | tokens a call | writing | whole |")
        for k in ks:
            for b in rows:
                row = measure(atlas, file, k, b, drafts)
                encode, greedy = row["seconds"]["encode"], row["seconds"][0]
                for d in drafts:
                    now = row["seconds"][d]
                    print(
                        f"| {k} | {b} | {encode:.2f} | {greedy:.2f} | {d} "
                        f"| {row['per call'][d]:.2f} | {greedy / now:.2f} "
                        f"| {(encode + greedy) / (encode + now):.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
