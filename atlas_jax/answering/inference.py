"""What the entry points beside training do: index a corpus, retrieve, evaluate, ask."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

from jax.sharding import Mesh

from atlas_jax.answering.answers import Reading, make_answer
from atlas_jax.answering.evaluation import Finder, Rows, Search, make_evaluation, make_evaluator
from atlas_jax.answering.evaluator import Evaluator, Found, score, write_predictions
from atlas_jax.answering.run import AnswerRun, IndexRun, RetrieveRun
from atlas_jax.answering.scorable import tell_unscorable
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec
from atlas_jax.corpus.corpus import Corpus, open_store
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.index.int8 import dtype_of
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import load_index
from atlas_jax.models.assembly import (
    Assembled,
    Tokenizers,
    assemble,
    load_retriever,
    load_tokenizers,
)
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Record, evaluation_examples

# The field of a record that holds what a person types.
_QUESTION_FIELDS = {"qa": "question", "base": "query"}


def build_index(told: IndexRun) -> tuple[int, bool]:
    """Build the store and the index of CorpusConfig, where they are not there yet.

    Returns:
      How many passages it holds, and whether anything was embedded: an index that the
      same passage tower made of the same passages, in the same type, stays as it is.

    Raises:
      UserError: a setting or file at fault; what was there before is untouched then.
    """
    config = told.corpus.config
    if not config.index:
        raise UserError("CorpusConfig.index is not given: bind it to the directory to write")
    with use_devices(told.devices) as (mesh, rules):
        retriever, params, tokenizer = load_retriever(told.models)
        params = multihost.place(params, partitioning.replicated(mesh))
        store = open_store(told.corpus, load_tokenizers(told.models.config))
        store.check_vocab(retriever=retriever.config.vocab_size)
        embedder = Embedder(retriever, tokenizer, config, mesh, rules)
        if multihost.of_first(_is_there(config, store, embedder.hash(params))):
            return store.count, False
        embedder.to_directory(params, store, config.index)
        return store.count, True


def _is_there(config: CorpusConfig, store: PassageStore, encoder_hash: str) -> bool:
    try:
        found = load_index(config.index, store, encoder_hash)
    except UserError:
        return False
    return dtype_of(found.embeddings_ne) == config.dtype


def retrieve(told: RetrieveRun) -> dict[str, float]:
    """Write the passages found for each question of a file; needs the retriever alone.

    Returns:
      The task's retrieval scores, where the file has gold passages or answers.

    Raises:
      UserError: a setting or file at fault.
    """
    config, task = told.retrieve, told.task
    with use_devices(told.devices) as (mesh, rules):
        records = task.load(config.file, False, told.rows)
        retriever, params, _ = load_retriever(told.models)
        params = multihost.place(params, partitioning.replicated(mesh))
        tokenizers = load_tokenizers(told.models.config)
        corpus = _load_corpus(
            told.corpus, retriever, None, params, tokenizers, mesh, rules, config.rerank > 0
        )
        evaluator = make_evaluator(
            Finder(retriever, tokenizers, corpus, mesh, rules),
            Search("index", config.k, config.rerank, "RetrieveConfig.k", "RetrieveConfig.rerank"),
            Rows(config.batch_size, "RetrieveConfig.batch_size"),
            told.data,
        )
        examples = evaluation_examples(task, records)
        tell_unscorable(config.file, examples, False, corpus.store)
        found = evaluator({"retriever": params}, examples, progress="retrieve")
        if multihost.is_first():
            write_predictions(config.output, task, found, config.negatives)
        return score(task, found, sorted({k for k in told.recall_at if k <= config.k} | {config.k}))


def evaluate(told: AnswerRun) -> tuple[list[Found], dict[str, float]]:
    """Answer and score a file; write its predictions if EvalConfig says where.

    Raises:
      UserError: a setting or file at fault.
    """
    with _ready(told) as (made, corpus):
        evaluation = make_evaluation(
            told, made.models, made.tokenizers, corpus, made.mesh, made.rules
        )
        found, scores = evaluation.run(made.params)
    if told.evaluation.predictions and multihost.is_first():
        write_predictions(told.evaluation.predictions, told.task, found)
    return found, scores


@dataclasses.dataclass(frozen=True)
class Asker:
    """Answers one typed question after the other; the first compiles the programs.

    A question asked again is sampled anew where GenerationConfig.method is 'sample'.
    """

    told: AnswerRun
    params: Params
    evaluator: Evaluator
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def ask(self, question: str) -> Found:
        """The answer with the passages that were read.

        Raises:
          UserError: the question is empty.
        """
        if not question.strip():
            raise UserError("the question is empty; type what you want to know")
        field = _QUESTION_FIELDS[self.told.evaluation.task]
        record = Record("1", "the question", {field: question.strip()}, (), None, {})
        example = self.told.task.example(record)
        number = next(self.numbers)
        return self.evaluator(self.params, [example], progress="", first=number)[0]


@contextlib.contextmanager
def asker(told: AnswerRun) -> Iterator[Asker]:
    """Load models and corpus to answer questions.

    Raises:
      UserError: a setting or file at fault.
    """
    config, read = told.evaluation, told.read
    if config.task not in _QUESTION_FIELDS:
        raise UserError(
            f"EvalConfig.task = {config.task!r} is not for typed questions; "
            f"use {' or '.join(_QUESTION_FIELDS)}"
        )
    if config.passages == "file":
        raise UserError(
            "EvalConfig.passages = 'file': a typed question brings no passages; "
            "use 'index', or 'none' for closed book"
        )
    with _ready(told) as (made, corpus):
        models, mesh = made.models, made.mesh
        reading = Reading(read.k, read.reader_length, explains=config.explain)
        evaluator = make_evaluator(
            Finder(models.retriever, made.tokenizers, corpus, mesh, made.rules),
            Search(config.passages, read.k, read.rerank),
            Rows(mesh.size),  # one question for each device
            told.data,
            make_answer(models.reader, told.generation, reading, mesh),
        )
        yield Asker(told, made.params, evaluator)


@contextlib.contextmanager
def _ready(told: AnswerRun) -> Iterator[tuple[Assembled, Corpus | None]]:
    """Models, and the corpus with its index if passages come from there."""
    with use_devices(told.devices) as (mesh, rules):
        made = assemble(told.models, mesh, rules)
        corpus = None
        if told.evaluation.passages == "index":
            corpus = _load_corpus(
                told.corpus,
                made.models.retriever,
                made.models.reader,
                made.params["retriever"],
                made.tokenizers,
                mesh,
                rules,
                reranks=told.read.rerank > 0,
            )
        yield made, corpus


def _load_corpus(
    spec: CorpusSpec,
    retriever: DualEncoder,
    reader: T5 | None,
    params: Params,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    reranks: bool,
) -> Corpus:
    store = open_store(spec, tokenizers)
    store.check_vocab(retriever=retriever.config.vocab_size)
    if reader is not None:
        store.check_vocab(reader=reader.config.vocab_size)
    embedder = Embedder(retriever, tokenizers.retriever, spec.config, mesh, rules)
    corpus = Corpus(store, embedder, spec, mesh, retriever_tokens=reranks)
    corpus.load_first(params)
    return corpus
