"""The reader that self-training teaches: it chooses among the labels' words over its passages.

The retriever finds the passages and never changes, so an index stays as it is. Each label's logit
is the log-likelihood of its word, read from all passages of a line at once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh

from atlas_jax.answering.answers import Reading, choice_scores, encoded, joined
from atlas_jax.answering.batcher import Batcher
from atlas_jax.answering.defaults import checked_formats
from atlas_jax.answering.evaluation import make_evaluation
from atlas_jax.answering.evaluator import make_find, write_predictions
from atlas_jax.answering.truncation import tell_cut
from atlas_jax.core import deltas, multihost, trees
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.types import Array, Batch, Params, Passages
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.opening import make_corpus, open_store
from atlas_jax.corpus.reader_states import PassageReader, reader_states
from atlas_jax.corpus.rounding import settled
from atlas_jax.corpus.sources import make_source
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import (
    Tokenizers,
    expectations,
    export_model,
    initial_params,
    load_tokenizers,
    open_models,
)
from atlas_jax.models.parameters import Models, abstract_params
from atlas_jax.tasks.base import Record
from atlas_jax.training.config import PREDICTIONS
from atlas_jax.training.exporting import written_in_part
from atlas_jax.training.known import without_known
from atlas_jax.training.prompted import NO_LABEL
from atlas_jax.training.self_training_config import ReaderSelfTrainingRun
from atlas_jax.training.state import Trains, split_trainable
from atlas_jax.training.taught import Scores, Taught

_BINDING = "SelfTrainConfig"


@flax.struct.dataclass
class Queries:
    """Lines of a task, as retriever and reader read them.

    Attributes:
      batch: tokens of queries and of the labels' words.
      labels_b: as in `Lines`.
      passages: those found for each line; None until then.
    """

    batch: Batch
    labels_b: Array
    passages: Passages | None = None

    def rows(self, index: Any) -> "Queries":
        """Some of the rows, on the host."""
        return jax.tree.map(lambda x: x[index], self)


@dataclasses.dataclass(frozen=True)
class _Side:
    """Both models of a run, and what they read."""

    told: ReaderSelfTrainingRun
    models: Models
    tokenizers: Tokenizers
    store: PassageStore | None
    corpus: Corpus | None
    mesh: Mesh
    rules: tuple[Rule, ...]


def taught_reader(
    told: ReaderSelfTrainingRun, directory: Path, mesh: Mesh, rules: tuple[Rule, ...]
) -> Taught:
    """The reader of a run with its files, which are read first: their faults are found at once.

    Raises:
      UserError: a setting or file at fault.
    """
    labelled, unlabelled = _records(told)
    side = _opened(told, mesh, rules)
    models, patterns = side.models, _patterns(told, side.models)

    def start() -> Params:
        return initial_params(told.models, models, mesh, rules, told.train.seed)

    def opened(params: Params) -> None:
        corpus = side.corpus
        if corpus is None:
            return
        lengths = told.step.reader_length, told.data.query_length
        reader = PassageReader(models.reader, params["reader"], *lengths)
        corpus.states = reader_states(told.corpus.config, reader)
        corpus.load_first(params["retriever"])

    return Taught(
        boxed=abstract_params(models),
        patterns=patterns,
        start=start,
        small=_small(models),
        logits=_logits(told, models),
        labelled=_queries(side, labelled, told.train.file),
        unlabelled=_queries(side, unlabelled, told.train.unlabelled_file),
        found=_found(side),
        opened=opened,
        scores=_scores(side, directory) if told.train.eval_file else None,
        export=_exports(side, patterns),
    )


def _records(told: ReaderSelfTrainingRun) -> tuple[list[Record], list[Record]]:
    """The labelled lines, and the others but for those that are known."""
    config, task = told.train, told.task
    labelled = task.load(config.file, rows=told.rows)
    unlabelled = task.load(config.unlabelled_file, need_targets=False, rows=told.rows)
    if config.leave_out_known:
        evaluated = []
        if config.eval_file:
            evaluated = task.load(config.eval_file, need_targets=False, rows=told.rows)
        unlabelled = without_known(unlabelled, [*labelled, *evaluated], task.asks, config)
    return labelled, unlabelled


def _opened(told: ReaderSelfTrainingRun, mesh: Mesh, rules: tuple[Rule, ...]) -> _Side:
    """Models and passages; no parameter is read."""
    if told.train.passages != "none":
        formats = checked_formats(told.models, told.corpus.formats, told.data)
        told = dataclasses.replace(told, corpus=dataclasses.replace(told.corpus, formats=formats))
    store = None
    if told.searches:
        store = open_store(told.corpus, load_tokenizers(told.models.config))
    models, tokenizers = open_models(told.models, "fixed")
    if models.reader.config.num_experts:
        raise UserError(
            f"the reader of {told.models.config.reader} has {models.reader.config.num_experts} "
            "experts, which only train teaches: here nothing would keep them balanced"
        )
    width = models.retriever.config.embedding_dim
    step = settled(told.step, told.corpus.config, store, width)
    told, corpus = dataclasses.replace(told, step=step), None
    if store is not None:
        corpus = make_corpus(
            told.corpus, store, models.retriever, tokenizers.retriever, mesh, rules,
            told.step.embeds_passages, models.reader,
        )  # fmt: skip
    return _Side(told, models, tokenizers, store, corpus, mesh, rules)


def _patterns(told: ReaderSelfTrainingRun, models: Models) -> tuple[str, ...]:
    """The paths that train: the reader's adapters or LoRA, or else all of it."""
    never = tuple(f"reader/{path}" for path in models.reader.config.untrained)
    trains = Trains("fixed", tuple(told.train.train), never, f"{_BINDING}.train")
    moving, _ = split_trainable(meta.unbox(abstract_params(models)), trains)
    return tuple(traverse_util.flatten_dict(moving, sep="/"))


def _small(models: Models) -> Callable[[jax.Array], Params]:
    """What draws a reader's adapters or LoRA anew.

    A prompt that begins as rows of the token table begins as the same rows in each round.
    """
    config = dict(models.deltas).get("reader")
    bare = abstract_params(dataclasses.replace(models, deltas=()))["reader"]

    def small(key: jax.Array) -> Params:
        if config is None or config.begins_as_rows:
            return {}
        return {"reader": meta.unbox(deltas.new_delta(bare, config, key))}

    return small


def _logits(told: ReaderSelfTrainingRun, models: Models) -> Callable[..., jax.Array]:
    reader = models.reader
    reading = Reading(told.step.k, told.step.reader_length, chooses=True)

    def logits(params: Params, rows: Queries, key: jax.Array | None) -> jax.Array:
        assert rows.passages is not None and rows.batch.choices is not None
        keys: Any = (None, None) if key is None else jax.random.split(key)
        tokens_bkl = joined(reader, params, rows.batch, rows.passages, reading)
        enc = encoded(reader, params, tokens_bkl, rows.passages, reading, keys[0])
        source = reader, params["reader"], enc, tokens_bkl
        prompt_bp = rows.batch.prompt_tokens_bp
        return choice_scores(source, rows.batch.choices, prompt_bp, keys[1])

    return logits


def _queries(side: _Side, records: Sequence[Record], file: str) -> Queries:
    """The lines of a file as tokens.

    Raises:
      UserError: names the file and what is wrong with one of its lines.
    """
    told, task = side.told, side.told.task
    words = list(task.spoken.values())
    batcher = Batcher(
        side.tokenizers,
        told.data,
        side.store,
        given_passages=told.step.k if told.train.passages == "file" else 0,
        formats=told.corpus.formats,
        choices=len(words),
        length_penalty=told.generation.length_penalty,
    )
    examples = [task.example(record) for record in records]
    batcher.check(examples, file)
    tell_cut(file, examples, side.tokenizers, told.data, learnt=False)
    labels = [record.fields.get(task.label) for record in records]
    places = [NO_LABEL if one is None else words.index(task.spoken[one]) for one in labels]
    return Queries(batcher(examples), np.array(places, np.int32))


def _found(side: _Side) -> Callable[[Params, Queries], Queries]:
    """What finds the passages of lines that lie on the mesh."""
    told, retriever, mesh = side.told, side.models.retriever, side.mesh
    step = told.step
    source = make_source(
        told.train.passages, side.corpus, step.searched,
        "StepConfig.rerank" if step.rerank else "StepConfig.k", retriever, mesh,
    )  # fmt: skip
    size = told.train.unlabelled_batch_size
    rows = batch_sharding(f"{_BINDING}.unlabelled_batch_size", size, mesh, side.rules)
    find = make_find(retriever, source, mesh, step.k if step.rerank else 0, rows)

    def found(params: Params, queries: Queries) -> Queries:
        batch = queries.batch
        passages = find(params, source.of_batch(params, batch), batch)
        # Only the reader reads them, so what the retriever would is left out.
        passages = dataclasses.replace(passages, retriever_tokens_bkm=None, embeddings_bke=None)
        return dataclasses.replace(queries, passages=passages)

    return found


def _scores(side: _Side, directory: Path) -> Callable[[Params, int], Scores]:
    """What answers and scores the evaluation file."""
    evaluation = make_evaluation(
        side.told.answers, side.models, side.tokenizers, side.corpus, side.mesh, side.rules
    )

    def scores(params: Params, step: int) -> Scores:
        found, scored = evaluation.run(params)
        if multihost.is_first():
            path = directory / PREDICTIONS / f"step_{step:07d}.jsonl"
            write_predictions(path, evaluation.task, found)
        return scored

    return scores


def _exports(side: _Side, patterns: tuple[str, ...]) -> Callable[..., None]:
    told, models = side.told, side.models
    expects = told.taught(
        expectations(told.models.config), side.store.config if side.store else None
    )

    def export(folder: Path, params: Params, counted: Mapping[str, Any]) -> None:
        moving, frozen = trees.split(params, patterns)
        config = told.models.config
        about = {
            "task": told.task.name,
            "trained": trees.count(moving),
            "parameters": trees.count(params),
            **counted,
        }
        partial = written_in_part(config, models, moving, frozen, bool(told.train.train))
        export_model(
            folder, models, params, side.tokenizers, config.export_dtype, about, expects, partial
        )

    return export
