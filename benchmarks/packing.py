"""Time our own step and generation with padded against packed passages, of real-like lengths.

    python -m benchmarks.packing [--rounds 5] [--json FILE] [passages=8 batch=2 ...]

Inputs have 20 to 384 tokens, 150 on average, as paragraphs of Wikipedia with a question have. Both
forms are alive at once and take turns. A ratio above 1 means that packing is faster. What they
compute is compared, too. For embedding a corpus, the other form is what `build_index` does: batches
of passages of like length.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from atlas_jax.answering.packed_rows import packed_passages, packed_rows
from atlas_jax.core import partitioning
from atlas_jax.core.compiler import encoder_options
from atlas_jax.core.packing import Inputs, pack, packed_or_padded, rows_needed
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Batch, Params, Passages
from atlas_jax.corpus.config import FROM_LENGTHS, ReadConfig
from atlas_jax.corpus.retrieval import retrieved_already
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.embed import embed_corpus
from atlas_jax.models.parameters import RetrieverTraining, init_params
from atlas_jax.models.towers import embed_passages
from atlas_jax.reader import fid
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.generate import generate as generate_tokens
from atlas_jax.training import state as train_state
from atlas_jax.training.config import OptimizerConfig, StepConfig
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.step import compile_train_step, make_train_step
from benchmarks.ours import models_of
from benchmarks.workloads import Sizes, lengths_of_paragraphs

SIZES = Sizes(length=384, embed_passages=400)
TOGETHER = 40  # passages that are packed at a time where a corpus is embedded
DISTILLATION = DistillationConfig(gold_temperature=0.1, score_temperature=0.1)
WORKLOADS = ("step, query side", "step, joint", "generate", "embed")


def train_step(
    sizes: Sizes, rows: int, shared: int, training: RetrieverTraining
) -> Callable[[], float]:
    """PDist step on given passages, which gives the sum of its losses.

    Args:
      rows, shared: that the passages share in the reader and in the passage tower; 0 = none.
      training: of the retriever.
    """
    models, mesh = models_of(sizes), partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"))
    optimizers = dict.fromkeys(PARTS, optimizer)
    config = StepConfig(
        k=sizes.passages,
        reader_length=sizes.length,
        retriever_training=training,
        packed_rows=rows,
        packed_passages=shared,
    )
    step = make_train_step(models, config, DISTILLATION, optimizers, retrieved_already)
    batch, passages = inputs(sizes)
    with partitioning.activate(mesh, STANDARD_RULES):
        params = init_params(models, 0, mesh, STANDARD_RULES)
        trains = train_state.Trains(training)
        shaping = (optimizers, trains)
        current = train_state.make_state(models, params, *shaping, 0, mesh, STANDARD_RULES)
        shardings = train_state.state_shardings(models, *shaping, mesh, STANDARD_RULES)
    compiled = compile_train_step(step, shardings, mesh, STANDARD_RULES)

    def run() -> float:
        nonlocal current
        with partitioning.activate(mesh, STANDARD_RULES):
            current, metrics = compiled(current, passages, batch)
        assert not rows or metrics["packed"] == 1, "the batch does not fit"
        return float(metrics["reader_loss"] + metrics["retriever_loss"])

    return run


def generate(sizes: Sizes, rows: int) -> Callable[[], float]:
    """Encode the passages, fuse them, decode 16 tokens greedily; gives the answers' scores."""
    models, mesh = models_of(sizes), partitioning.make_mesh(MeshConfig(), jax.devices()[:1])
    params = init_params(models, 0, mesh, ())["reader"]
    batch, passages = inputs(sizes)
    question_bkq = np.repeat(np.asarray(batch.query_tokens_bq)[:, None], sizes.passages, axis=1)
    tokens_bkl = np.concatenate([question_bkq, passages.reader_tokens_bkl], axis=2)
    # No answer ends before.
    config = GenerationConfig(max_length=sizes.target, min_length=sizes.target - 1)

    @jax.jit
    def answer(params: Params, tokens_bkl: jax.Array) -> jax.Array:
        def of(given: Inputs) -> jax.Array:
            enc = fid.encode(models.reader, params, given)
            enc_bsd, mask_bs, _ = fid.fuse(models.reader, enc, given)
            return generate_tokens(models.reader, params, enc_bsd, mask_bs, config)[1]

        return packed_or_padded(of, (tokens_bkl, rows))

    return lambda: float(answer(params, tokens_bkl).sum())


def embed(sizes: Sizes, together: int) -> Callable[[], float]:
    """Embed passages and give the sum of their embeddings.

    Args:
      together: passages that are packed at a time; 0 = batches of passages of like length.
    """
    retriever = models_of(sizes).retriever
    lengths_n1 = lengths_of_paragraphs(sizes, (sizes.embed_passages, 1))
    tokens_nm = np.random.default_rng(0).integers(3, sizes.retriever_vocab, sizes.length)[None]
    tokens_nm = np.where(np.arange(sizes.length) < lengths_n1, tokens_nm, 0).astype(np.int32)
    params = retriever.init(jax.random.key(0), tokens_nm[:1], True, method="embed_passage")
    tower = functools.partial(embed_passages, retriever, params["params"])
    options, few = encoder_options(), sizes.embed_batch
    if not together:
        padded = jax.jit(lambda tokens_bm: tower(tokens_bm[None])[0], compiler_options=options)
        every = functools.partial(embed_corpus, padded, tokens_nm, few, progress=False)
        return lambda: float(np.abs(every()).sum())
    whole = len(tokens_nm) // together * together
    parts = tokens_nm[:whole].reshape(-1, 1, together, sizes.length)  # as of one question each
    rows = max(int(rows_needed((part != 0).sum(-1), sizes.length)[0]) for part in parts)
    packed = jax.jit(lambda tokens_bkm: tower(pack(tokens_bkm, rows)[0]), compiler_options=options)
    return lambda: float(sum(np.abs(packed(part)).sum() for part in parts))


def inputs(sizes: Sizes, seed: int = 0) -> tuple[Batch, Passages]:
    """A batch whose reader inputs have the lengths of paragraphs, and as long retriever inputs."""
    rng = np.random.default_rng(seed)
    b, k, q = sizes.batch, sizes.passages, sizes.query_length
    lengths_bk1 = lengths_of_paragraphs(sizes, (b, k, 1))

    def ragged(vocabulary: int, lengths: np.ndarray, width: int) -> np.ndarray:
        tokens = rng.integers(3, vocabulary, (b, k, width))
        return np.where(np.arange(width) < lengths, tokens, 0).astype(np.int32)

    def full(vocabulary: int, width: int) -> np.ndarray:
        return rng.integers(3, vocabulary, (b, width)).astype(np.int32)

    return Batch(
        query_tokens_bq=full(sizes.reader_vocab, q),
        retriever_tokens_br=full(sizes.retriever_vocab, q),
        target_tokens_bt=full(sizes.reader_vocab, sizes.target),
        excluded_rows_bx=np.full((b, 1), -1, np.int32),
        weight_b=np.ones(b, np.float32),
    ), Passages(
        rows_bk=np.zeros((b, k), np.int32),
        scores_bk=np.zeros((b, k), np.float32),
        reader_tokens_bkl=ragged(sizes.reader_vocab, lengths_bk1 - q - 1, sizes.length - q),
        retriever_tokens_bkm=ragged(sizes.retriever_vocab, lengths_bk1, sizes.length),
        mask_bk=np.ones((b, k), bool),
        embeddings_bke=rng.standard_normal((b, k, sizes.retriever_width), np.float32),
    )


def measure(workload: str, sizes: Sizes, rows: int, shared: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round of both forms, and the most that their results differ."""
    forms = {}
    for form, packed in (("padded", (0, 0)), ("packed", (rows, shared))):
        if workload == "generate":
            forms[form] = generate(sizes, packed[0])
        elif workload == "embed":
            forms[form] = embed(sizes, TOGETHER if packed[0] else 0)
        else:
            training: RetrieverTraining = "joint" if "joint" in workload else "query_side"
            forms[form] = train_step(sizes, *packed, training)
    first = {form: run() for form, run in tqdm(forms.items(), f"{workload}: compile", leave=False)}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in tqdm(range(rounds), workload, leave=False):
        for form, run in forms.items():
            started = time.perf_counter()
            run()
            seconds[form].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)]
    return {
        "workload": workload,
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "difference": abs(first["padded"] - first["packed"]) / abs(first["padded"]),
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A line for each workload."""
    out = Table(title="padded / packed; above 1 = packing is faster")
    for column in ("workload", "padded s", "packed s", "ratio", "range", "difference"):
        out.add_column(column, justify="left" if column == "workload" else "right")
    for r in results:
        out.add_row(
            r["workload"],
            *(f"{statistics.median(r['seconds'][form]):.3f}" for form in ("padded", "packed")),
            f"{r['ratio']:.2f}",
            f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}",
            f"{r['difference']:.1e}",
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all workloads; exit code 1 if packing is slower in one that packs by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write every figure to this file")
    parser.add_argument("--workloads", default=";".join(WORKLOADS), help="separated by ;")
    parser.add_argument("sizes", nargs="*", help="Sizes field=value, to try a smaller problem")
    args = parser.parse_args(argv)
    changes: dict[str, Any] = {
        name: int(value) for name, value in (one.split("=") for one in args.sizes)
    }
    sizes = dataclasses.replace(SIZES, **changes)
    lengths = lengths_of_paragraphs(sizes, (20_000,))
    read = ReadConfig(k=sizes.passages, reader_length=sizes.length, packed_rows=FROM_LENGTHS)
    # The lengths are of whole inputs, with their question and end token.
    of_texts, models = (np.zeros(1, int), lengths - 1), models_of(sizes)
    rows = packed_rows(read, models, read.k, sizes.batch, lambda: of_texts)
    shared = packed_passages(read, read.k, sizes.batch, sizes.length, lambda: lengths)
    results = [measure(one, sizes, rows, shared, args.rounds) for one in args.workloads.split(";")]
    Console(width=100).print(table(results))
    print(
        f"{sizes.batch} questions, {rows} rows for {sizes.passages} inputs of {sizes.length}, "
        f"{shared} for the retriever"
    )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(
                {"sizes": vars(sizes), "rows": rows, "shared": shared, "results": results},
                file,
                indent=1,
            )
    return 0 if all(r["ratio"] >= 1 for r in results if r["workload"] != "embed") else 1


if __name__ == "__main__":
    sys.exit(main())
