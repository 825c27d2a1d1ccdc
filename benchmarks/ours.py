"""The workloads on this project's own modules, as a user's run would call them."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.answering.packed_rows import packed_passages, packed_rows
from atlas_jax.core import partitioning
from atlas_jax.core.compiler import CompilerConfig, encoder_options, programs_at_a_time
from atlas_jax.core.packing import Inputs, packed_or_padded
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Batch, DeviceIndex, Params, Passages
from atlas_jax.corpus.config import ReadConfig
from atlas_jax.corpus.retrieval import retrieved_already
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.embed import embed_corpus
from atlas_jax.index.exact import ExactSearcher
from atlas_jax.models.parameters import Models, init_params
from atlas_jax.reader import fid
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.generate import generate as generate_tokens
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training import state as train_state
from atlas_jax.training.config import OptimizerConfig, StepConfig
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.step import compile_train_step, make_train_step
from benchmarks.real_text import Asked, batches, padded, passage_tokens
from benchmarks.workloads import (
    Sizes,
    Ways,
    passages_of_real_lengths,
    reader_inputs,
    search_arrays,
)

QUESTION = 64  # tokens of a real question at most


def models_of(sizes: Sizes) -> Models:
    """Reader and retriever of these sizes, without dropout."""
    reader = ReaderConfig(
        vocab_size=sizes.reader_vocab,
        emb_dim=sizes.reader_width,
        num_heads=sizes.reader_heads,
        head_dim=sizes.reader_width // sizes.reader_heads,
        mlp_dim=sizes.reader_mlp,
        num_encoder_layers=sizes.reader_layers,
        num_decoder_layers=sizes.reader_layers,
        dropout_rate=0.0,
    )
    retriever = RetrieverConfig(
        vocab_size=sizes.retriever_vocab,
        hidden_dim=sizes.retriever_width,
        num_layers=sizes.retriever_layers,
        num_heads=sizes.retriever_heads,
        mlp_dim=sizes.retriever_mlp,
        dropout_rate=0.0,
    )
    return Models(T5(reader), DualEncoder(retriever))


def train_step(sizes: Sizes) -> Callable[[], object]:
    """PDist step of reader and both towers on given passages."""
    inputs, q = reader_inputs(sizes), sizes.query_length
    batch = Batch(
        query_tokens_bq=inputs.tokens_bkl[:, 0, :q].astype(np.int32),
        retriever_tokens_br=inputs.query_br.astype(np.int32),
        target_tokens_bt=inputs.targets_bt.astype(np.int32),
        excluded_rows_bx=np.full((sizes.batch, 1), -1, np.int32),
        weight_b=np.ones(sizes.batch, np.float32),
    )
    passages = _given(inputs.tokens_bkl[:, :, q:], inputs.passages_bkm)
    config = StepConfig(k=sizes.passages, reader_length=sizes.length, retriever_training="joint")
    return _step(sizes, config, [(passages, batch)])


def _given(reader_tokens_bkl: np.ndarray, retriever_tokens_bkm: np.ndarray) -> Passages:
    b, k, _ = reader_tokens_bkl.shape
    return Passages(
        rows_bk=np.zeros((b, k), np.int32),
        scores_bk=np.zeros((b, k), np.float32),
        reader_tokens_bkl=reader_tokens_bkl.astype(np.int32),
        retriever_tokens_bkm=retriever_tokens_bkm.astype(np.int32),
        mask_bk=np.ones((b, k), bool),
    )


def _step(
    sizes: Sizes, config: StepConfig, given: Sequence[tuple[Passages, Batch]]
) -> Callable[[], object]:
    """A step that takes the next batch at each call."""
    models, rules = models_of(sizes), STANDARD_RULES
    mesh = partitioning.make_mesh(MeshConfig())
    optimizers = {
        part: make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"))
        for part in PARTS
    }
    distillation = DistillationConfig(gold_temperature=0.1, score_temperature=0.1)
    step = make_train_step(models, config, distillation, optimizers, retrieved_already)
    with partitioning.activate(mesh, rules):
        params, joint = init_params(models, 0, mesh, rules), train_state.Trains("joint")
        current = train_state.make_state(models, params, optimizers, joint, 0, mesh, rules)
        shardings = train_state.state_shardings(models, optimizers, joint, mesh, rules)
    compiled, turns = compile_train_step(step, shardings, mesh, rules), itertools.cycle(given)

    def run() -> float:
        nonlocal current
        with partitioning.activate(mesh, rules):
            current, metrics = compiled(current, *next(turns))
        return float(metrics["reader_loss"] + metrics["retriever_loss"])

    return run


def real_step(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same on real texts, whose passages share rows as a run by itself chooses."""
    made = batches(sizes, corpus)
    rows = _rows(sizes, corpus, made)
    lengths = np.array([len(ids) for one in made for row in one.passages_bk for ids in row])
    read = ReadConfig(k=sizes.real_passages, packed_rows=-1)
    shared = packed_passages(read, read.k, sizes.real_batch, sizes.limit, lambda: lengths)
    config = StepConfig(
        k=sizes.real_passages,
        reader_length=sizes.limit,
        retriever_training="joint",
        packed_rows=rows,
        packed_passages=shared,
    )
    given = []
    for asked in made:
        questions = [ids[1:-1] for ids in asked.questions_b]  # the reader has no special tokens
        width = max(map(len, questions))
        batch = Batch(
            query_tokens_bq=padded(questions, sizes.limit).astype(np.int32)[:, :QUESTION],
            retriever_tokens_br=padded(asked.questions_b, QUESTION).astype(np.int32),
            target_tokens_bt=asked.targets_bt.astype(np.int32),
            excluded_rows_bx=np.full((sizes.real_batch, 1), -1, np.int32),
            weight_b=np.ones(sizes.real_batch, np.float32),
        )
        assert width <= QUESTION - 2
        texts = [
            [ids[len(question) : -1] for ids in row]
            for question, row in zip(questions, asked.inputs_bk, strict=True)
        ]
        given.append((_given(_apart(texts, sizes), _apart(asked.passages_bk, sizes)), batch))
    return _step(sizes, config, given)


def _apart(rows: Sequence[Sequence[Sequence[int]]], sizes: Sizes) -> np.ndarray:
    """Lists of tokens [b, k] as an array [b, k, limit]."""
    flat = padded([ids for row in rows for ids in row], sizes.limit)
    return flat.reshape(len(rows), -1, sizes.limit)


def _rows(sizes: Sizes, corpus: str, made: Sequence[Asked]) -> int:
    """Packed rows, from the lengths of passages and questions as a run takes them."""
    read = ReadConfig(k=sizes.real_passages, reader_length=sizes.limit, packed_rows=-1)
    questions = np.array([len(ids) - 2 for one in made for ids in one.questions_b])
    passages = np.array([len(ids) - 2 for one in made for row in one.passages_bk for ids in row])
    return packed_rows(
        read, models_of(sizes), read.k, sizes.real_batch, lambda: (questions, passages)
    )


def generate(sizes: Sizes) -> Callable[[], object]:
    """Encode k passages a query, fuse them, decode 16 tokens greedily with a cache."""
    return _generate(sizes, [reader_inputs(sizes).tokens_bkl.astype(np.int32)], 0)


def real_generate(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same on real texts, whose passages share rows."""
    made = batches(sizes, corpus)
    tokens = [_apart(asked.inputs_bk, sizes).astype(np.int32) for asked in made]
    return _generate(sizes, tokens, _rows(sizes, corpus, made))


def _generate(sizes: Sizes, given: Sequence[np.ndarray], rows: int) -> Callable[[], object]:
    models = models_of(sizes)
    params = init_params(models, 0, partitioning.make_mesh(MeshConfig()), ())
    # No token has this id, so every row is decoded to the full length, as on the other side.
    config = GenerationConfig(max_length=sizes.target, eos_id=sizes.reader_vocab)

    @jax.jit
    def answer(params: Params, tokens_bkl: jax.Array) -> jax.Array:
        def of(inputs: Inputs) -> jax.Array:
            enc = fid.encode(models.reader, params, inputs)
            enc_bsd, mask_bs, _ = fid.fuse(models.reader, enc, inputs)
            return generate_tokens(models.reader, params, enc_bsd, mask_bs, config)[0]

        return packed_or_padded(of, (tokens_bkl, rows))

    turns = itertools.cycle(given)
    return lambda: jax.block_until_ready(answer(params["reader"], next(turns)))


def embed(sizes: Sizes) -> Callable[[], object]:
    """Embed passages sorted by length, in batches of few static lengths, one on each core."""
    return _embed(sizes, passages_of_real_lengths(sizes).astype(np.int32))


def real_embed(sizes: Sizes, corpus: str) -> Callable[[], object]:
    """The same with passages of real text."""
    return _embed(sizes, padded(passage_tokens(sizes, corpus), sizes.limit).astype(np.int32))


def _embed(sizes: Sizes, tokens: np.ndarray) -> Callable[[], object]:
    CompilerConfig(cores=1).apply()
    retriever = models_of(sizes).retriever
    params = retriever.init(jax.random.key(0), tokens[:1], True, method="embed_passage")
    embed_fn = jax.jit(
        lambda batch: retriever.apply(params, batch, True, method="embed_passage"),
        compiler_options=encoder_options(),
    )
    at_a_time = programs_at_a_time()
    return lambda: embed_corpus(
        embed_fn, tokens, sizes.embed_batch, progress=False, at_a_time=at_a_time
    )


def search(sizes: Sizes, k: int) -> Ways:
    """Exact inner-product search on the device."""
    embeddings, queries = search_arrays(sizes)
    dummy = np.zeros((len(embeddings), 1), np.int32)
    index = DeviceIndex(
        embeddings_ne=jnp.asarray(embeddings),
        reader_tokens_nl=dummy,
        retriever_tokens_nm=dummy,
        count=jnp.int32(len(embeddings)),
        version=jnp.int32(0),
    )
    searcher = ExactSearcher(index)
    return {"": lambda: jax.block_until_ready(searcher.search(queries, k))}
