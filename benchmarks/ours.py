"""The workloads on this project's own modules, as a user's run would call them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.core import partitioning
from atlas_jax.core.compiler import CompilerConfig, encoder_options, programs_at_a_time
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Batch, DeviceIndex, Params, Passages
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
from benchmarks.workloads import (
    Sizes,
    Ways,
    passages_of_real_lengths,
    reader_inputs,
    search_arrays,
)


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
    models, rules = models_of(sizes), STANDARD_RULES
    mesh = partitioning.make_mesh(MeshConfig())
    optimizers = {
        part: make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"))
        for part in PARTS
    }
    config = StepConfig(k=sizes.passages, reader_length=sizes.length, retriever_training="joint")
    distillation = DistillationConfig(gold_temperature=0.1, score_temperature=0.1)
    step = make_train_step(models, config, distillation, optimizers, retrieved_already)
    inputs = reader_inputs(sizes)
    q = sizes.query_length
    batch = Batch(
        query_tokens_bq=inputs.tokens_bkl[:, 0, :q].astype(np.int32),
        retriever_tokens_br=inputs.query_br.astype(np.int32),
        target_tokens_bt=inputs.targets_bt.astype(np.int32),
        excluded_rows_bx=np.full((sizes.batch, 1), -1, np.int32),
        weight_b=np.ones(sizes.batch, np.float32),
    )
    passages = Passages(
        rows_bk=np.zeros((sizes.batch, sizes.passages), np.int32),
        scores_bk=np.zeros((sizes.batch, sizes.passages), np.float32),
        reader_tokens_bkl=inputs.tokens_bkl[:, :, q:].astype(np.int32),
        retriever_tokens_bkm=inputs.passages_bkm.astype(np.int32),
        mask_bk=np.ones((sizes.batch, sizes.passages), bool),
    )
    with partitioning.activate(mesh, rules):
        params, joint = init_params(models, 0, mesh, rules), train_state.Trains("joint")
        current = train_state.make_state(models, params, optimizers, joint, 0, mesh, rules)
        shardings = train_state.state_shardings(models, optimizers, joint, mesh, rules)
    compiled = compile_train_step(step, shardings, mesh, rules)

    def run() -> float:
        nonlocal current
        with partitioning.activate(mesh, rules):
            current, metrics = compiled(current, passages, batch)
        return float(metrics["reader_loss"] + metrics["retriever_loss"])

    return run


def generate(sizes: Sizes) -> Callable[[], object]:
    """Encode k passages a query, fuse them, decode 16 tokens greedily with a cache."""
    models = models_of(sizes)
    params = init_params(models, 0, partitioning.make_mesh(MeshConfig()), ())
    tokens_bkl = reader_inputs(sizes).tokens_bkl.astype(np.int32)
    # No token has this id, so every row is decoded to the full length, as on the other side.
    config = GenerationConfig(max_length=sizes.target, eos_id=sizes.reader_vocab)

    @jax.jit
    def answer(params: Params, tokens_bkl: jax.Array) -> jax.Array:
        enc_bkld = fid.encode(models.reader, params, tokens_bkl)
        enc_bsd, mask_bs, _ = fid.fuse(models.reader, enc_bkld, tokens_bkl)
        return generate_tokens(models.reader, params, enc_bsd, mask_bs, config)[0]

    return lambda: jax.block_until_ready(answer(params["reader"], tokens_bkl))


def embed(sizes: Sizes) -> Callable[[], object]:
    """Embed passages sorted by length, in batches of few static lengths, one on each core."""
    CompilerConfig(cores=1).apply()
    retriever = models_of(sizes).retriever
    tokens = passages_of_real_lengths(sizes).astype(np.int32)
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
