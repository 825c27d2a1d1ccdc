"""The programs of a run, built abstractly for a mesh of chips that need not exist.

Models, optimisers, step, search and decoding are the run's own, made by the same factories as in
training. Only their arrays are abstract: shapes without numbers. No file is read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from atlas_jax.answering.answers import Reading, make_answer
from atlas_jax.answering.packed_rows import packed_rows
from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import batch_sharding, filled_batch
from atlas_jax.core.types import Batch, DeviceIndex, Passages
from atlas_jax.corpus.retrieval import make_device_retrieve, no_passages, rerank, retrieved_already
from atlas_jax.index.int8 import abstract_rows, as_floats
from atlas_jax.index.placement import embeddings_layout, tokens_layout
from atlas_jax.models.parameters import abstract_params
from atlas_jax.models.towers import embed_query, passage_tower
from atlas_jax.planning.estimate import shard_bytes
from atlas_jax.planning.run import AnyRun, Pretraining, Run, in_lanes, token_type
from atlas_jax.retriever.dual_encoder import is_tied
from atlas_jax.training.encoder_texts import EncoderBatch
from atlas_jax.training.encoder_trainer import make_loss, state_and_step
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.pretrain_loss import tables_of
from atlas_jax.training.state import abstract_state, state_shardings, what_trains
from atlas_jax.training.step import compile_train_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    Attributes:
      terms: name in the table of memory -> the arguments under this name.
      loop_trips: how often the body of a loop without a fixed end runs at most.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    terms: dict[str, Any]
    loop_trips: int = 1


def make_program(name: str, run: AnyRun, mesh: Mesh) -> Program:
    """A program of this name for this mesh; call it, and lower it, inside `activate(mesh, rules)`.

    Raises:
      UserError: the batch or a parameter does not divide over the mesh.
    """
    if isinstance(run, Pretraining):
        return _pretrain(run, mesh)
    return {"train": _train, "embed": _embed, "search": _search, "decode": _decode}[name](run, mesh)


def lowered(program: Program, run: AnyRun, mesh: Mesh) -> Any:
    """The program lowered for the mesh's chips."""
    with partitioning.activate(mesh, run.rules):
        return program.function.lower(*program.args)  # type: ignore[attr-defined]


def held(run: AnyRun, mesh: Mesh) -> dict[str, Any]:
    """Arrays that stay on the chips for the whole run, whichever program runs."""
    if isinstance(run, Pretraining):
        return _pretrain(run, mesh).terms
    if run.entry == "train":
        return _train(run, mesh).terms
    params = _params(run, mesh)
    if run.entry == "build_index":
        return {"parameters": params["retriever"]}
    index = _index_terms(_index(run, mesh)) if run.on_devices else {}
    return {"parameters": params} | index


def resident(program: Program, run: AnyRun, mesh: Mesh) -> dict[str, int]:
    """Bytes on a chip of the run's arrays that are not arguments of this program."""
    if program.name in ("train", "pretrain"):
        return {}  # all arrays of the run are its arguments
    found = {}
    for term, tree in held(run, mesh).items():
        if program.name == "embed" and term.startswith("index") and not run.refreshes:
            continue  # embeds before there is an index
        found[term] = shard_bytes(tree) - shard_bytes(program.terms.get(term, ()))
    return {term: size for term, size in found.items() if size}


def refused_batch(name: str, run: AnyRun, mesh: Mesh) -> str:
    """Why a run would refuse the program's batch, which is planned with more rows; else ""."""
    if name in ("search", "decode"):
        return ""  # a run fills them up, too
    try:
        batch_sharding(*run.batch_of(name), mesh, run.rules)
    except UserError as error:
        rows = filled_batch(run.batch_of(name)[1], mesh, run.rules)
        return f"a run stops here: {error}; planned with {rows}"
    return ""


def _train(run: Run, mesh: Mesh) -> Program:
    batch = _batch(run, mesh, run.data.batch_size)  # first: it is cheap and may be refused
    optimizers = {part: make_optimizer(config) for part, config in run.optimizers.items()}
    shaping = (run.models, optimizers, what_trains(run.step, run.models), mesh, run.rules)
    shardings, state = state_shardings(*shaping), abstract_state(*shaping)
    retrieve, source = _source(run, mesh, run.data.batch_size, run.step.searched)
    step = make_train_step(run.models, run.step, run.distillation, optimizers, retrieve)
    terms = {"parameters": state.params, "optimiser": state.opt_state} | _index_terms(source)
    return Program(
        "train",
        compile_train_step(step, shardings, mesh, run.rules),
        (state, source, batch),
        terms,
    )


def _pretrain(run: Pretraining, mesh: Mesh) -> Program:
    """A step of `pretrain_encoder`: its masks are drawn inside, its rows come from the host."""
    told = run.pretraining
    row = _rows(run, mesh, (told.train.batch_size,), jnp.int32)
    row_l = _rows(run, mesh, (told.train.batch_size, told.train.length), jnp.int32)
    tables = tables_of(np.ones(run.encoder.vocab_size, bool), (0, 1, 2, 3), 4)  # any will do
    state, _, step = state_and_step(told, make_loss(told, run.encoder, tables), mesh, run.rules)
    terms = {"parameters": state.params, "optimiser": state.opt_state}
    return Program("pretrain", step, (state, EncoderBatch(row_l, row_l, row)), terms)


def _embed(run: Run, mesh: Mesh) -> Program:
    params = _tower(run, mesh, "passage_encoder")
    rows = filled_batch(run.corpus.embed_batch_size, mesh, run.rules)
    tokens = _rows(run, mesh, (rows, run.store.retriever_length), jnp.int32)
    function = jax.jit(
        passage_tower(run.models.retriever), out_shardings=partitioning.replicated(mesh)
    )
    return Program("embed", function, (params, tokens), {"parameters": params})


def _search(run: Run, mesh: Mesh) -> Program:
    # Only the parameters that the program uses: re-ranking also needs the passage tower.
    params = (
        {"retriever": _params(run, mesh)["retriever"]}
        if run.step.rerank
        else {"retriever": _tower(run, mesh, "query_encoder")}
    )
    rows = filled_batch(run.answer_batch, mesh, run.rules)
    retrieve, source = _source(run, mesh, rows, run.answer_searched)

    def find(params: Any, source: Any, batch: Batch) -> Passages:
        query_be = embed_query(run.models.retriever, params, batch)
        found = retrieve(source, query_be, batch)
        if not run.step.rerank:
            return found
        return rerank(run.models.retriever, params["retriever"], query_be, found, run.answer_depth)

    function = jax.jit(find, out_shardings=partitioning.replicated(mesh))
    terms = {"parameters": params} | _index_terms(source)
    return Program("search", function, (params, source, _batch(run, mesh, rows)), terms)


def _decode(run: Run, mesh: Mesh) -> Program:
    rows = filled_batch(run.answer_batch, mesh, run.rules)
    params = {"reader": _params(run, mesh)["reader"]}
    packed = packed_rows(run.step, run.models, run.answer_k, rows, lambda: None)
    reading = Reading(run.answer_k, run.step.reader_length, packed_rows=packed)
    answer: Any = make_answer(run.models.reader, run.generation, reading, mesh)
    args = (params, _batch(run, mesh, rows), _given(run, mesh, rows, run.answer_k))
    return Program("decode", answer, args, {"parameters": params}, run.generation.max_length)


def _params(run: Run, mesh: Mesh) -> Any:
    boxed = abstract_params(run.models)
    shardings = partitioning.param_shardings(boxed, mesh, run.rules)
    if run.entry == "build_index":  # each chip then has the whole retriever
        shardings = jax.tree.map(lambda _: partitioning.replicated(mesh), shardings)
    return jax.tree.map(_placed, meta.unbox(boxed), shardings)


def _tower(run: Run, mesh: Mesh, name: str) -> Any:
    """The retriever's parameters that one tower needs."""
    retriever = _params(run, mesh)["retriever"]
    return retriever if is_tied(retriever) else {name: retriever[name]}


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _rows(run: AnyRun, mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = batch_sharding(run.batch_of("train")[0], shape[0], mesh, run.rules)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _batch(run: Run, mesh: Mesh, rows: int) -> Batch:
    data = run.data

    def tokens(*shape: int) -> jax.ShapeDtypeStruct:
        return _rows(run, mesh, (rows, *shape), jnp.int32)

    return Batch(
        query_tokens_bq=tokens(data.query_length),
        retriever_tokens_br=tokens(data.retriever_query_length),
        target_tokens_bt=tokens(data.target_length),
        excluded_rows_bx=tokens(data.max_excluded),
        weight_b=_rows(run, mesh, (rows,), jnp.float32),
        prompt_tokens_bp=tokens(data.prompt_length) if data.prompt_length else None,
    )


def _given(run: Run, mesh: Mesh, rows: int, k: int) -> Passages:
    """Passages found by the host or by another program."""
    width = run.models.retriever.config.embedding_dim
    found = jax.eval_shape(as_floats, abstract_rows(1, width, run.corpus.dtype))

    def row(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return _rows(run, mesh, (rows, k, *shape), dtype)

    return Passages(
        rows_bk=row(),
        scores_bk=row(dtype=jnp.float32),
        reader_tokens_bkl=row(run.store.reader_length),
        retriever_tokens_bkm=row(run.store.retriever_length),
        mask_bk=row(dtype=jnp.bool_),
        embeddings_bke=row(width, dtype=found.dtype),
    )


def _source(run: Run, mesh: Mesh, rows: int, searched: int) -> tuple[Any, Any]:
    """The step's source, as in `corpus.sources`, for `searched` passages a row."""
    if run.passage_source == "none":
        return (lambda source, query_be, batch: no_passages(batch)), None
    if not run.on_devices:
        return retrieved_already, _given(run, mesh, rows, searched)
    retrieve = make_device_retrieve(searched, mesh, run.corpus.recall_target)
    return retrieve, _index(run, mesh)


def _index(run: Run, mesh: Mesh) -> DeviceIndex:
    models, store, whole = run.models, run.store, partitioning.replicated(mesh)
    width = models.retriever.config.embedding_dim
    embeddings = embeddings_layout(run.passages, width, run.corpus.dtype, mesh)

    def tokens(width: int, config: Any) -> jax.ShapeDtypeStruct:
        return tokens_layout(run.passages, width, token_type(config), mesh)

    return DeviceIndex(
        embeddings_ne=embeddings,
        reader_tokens_nl=tokens(store.reader_length, models.reader.config),
        retriever_tokens_nm=tokens(store.retriever_length, models.retriever.config)
        if run.step.embeds_passages
        else None,
        count=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        version=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )


def _index_terms(source: Any) -> dict[str, Any]:
    if not isinstance(source, DeviceIndex):
        return {}
    tokens = [
        jax.ShapeDtypeStruct(
            (array.shape[0], in_lanes(array.shape[1])), array.dtype, sharding=array.sharding
        )
        for array in (source.reader_tokens_nl, source.retriever_tokens_nm)
        if array is not None
    ]
    return {"index embeddings": source.embeddings_ne, "index tokens": tokens}
