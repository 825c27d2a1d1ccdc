"""What the entry points beside training do: index a corpus, retrieve, evaluate, ask."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

from jax.sharding import Mesh

from atlas_jax.answering.answers import Reading, make_answer
from atlas_jax.answering.batcher import Batcher, DataConfig
from atlas_jax.answering.config import EvalConfig, RetrieveConfig
from atlas_jax.answering.evaluator import (
    Evaluator,
    Found,
    make_evaluation,
    make_find,
    score,
    write_predictions,
)
from atlas_jax.answering.scorable import tell_unscorable
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.corpus.corpus import Corpus, open_store
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.sources import make_source
from atlas_jax.index.int8 import dtype_of
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import load_index
from atlas_jax.models.assembly import (
    Assembled,
    Tokenizers,
    active_mesh,
    assemble,
    load_retriever,
    load_tokenizers,
)
from atlas_jax.models.config import ModelConfig
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Record, evaluation_examples
from atlas_jax.tasks.registry import get_task
from atlas_jax.training.config import StepConfig

# The field of a record that holds what a person types.
_QUESTION_FIELDS = {"qa": "question", "base": "query"}


def build_index(config: CorpusConfig) -> tuple[int, bool]:
    """Build the store and the index of CorpusConfig, where they are not there yet.

    Returns:
      How many passages it holds, and whether anything was embedded: an index that the
      same passage tower made of the same passages, in the same type, stays as it is.

    Raises:
      UserError: a setting or file at fault; what was there before is untouched then.
    """
    if not config.index:
        raise UserError("CorpusConfig.index is not given: bind it to the directory to write")
    with active_mesh() as (mesh, rules):
        model_config = ModelConfig()
        retriever, params, tokenizer = load_retriever(model_config)
        params = multihost.place(params, partitioning.replicated(mesh))
        store = open_store(config, load_tokenizers(model_config))
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


def retrieve(config: RetrieveConfig) -> dict[str, float]:
    """Write the passages found for each question of a file; needs the retriever alone.

    Returns:
      The task's retrieval scores, where the file has gold passages or answers.

    Raises:
      UserError: a setting or file at fault.
    """
    with active_mesh() as (mesh, rules):
        model_config, corpus_config, task = ModelConfig(), CorpusConfig(), get_task(config.task)
        records = task.load(config.file, need_targets=False)
        retriever, params, _ = load_retriever(model_config)
        params = multihost.place(params, partitioning.replicated(mesh))
        tokenizers = load_tokenizers(model_config)
        reranks = config.rerank > 0
        corpus = _load_corpus(
            corpus_config, retriever, None, params, tokenizers, mesh, rules, reranks
        )
        wide = max(config.k, config.rerank)
        binding = "RetrieveConfig.rerank" if reranks else "RetrieveConfig.k"
        source = make_source("index", corpus, wide, binding, retriever, mesh)
        evaluator = Evaluator(
            batcher=Batcher(tokenizers, DataConfig(), corpus.store),
            batch_size=config.batch_size,
            rows=batch_sharding("RetrieveConfig.batch_size", config.batch_size, mesh, rules),
            source=source,
            find=make_find(retriever, source, mesh, config.k if reranks else 0),
            answer=None,
            tokenizer=tokenizers.reader,
            store=corpus.store,
        )
        examples = evaluation_examples(task, records)
        tell_unscorable(config.file, examples, False, corpus.store)
        found = evaluator({"retriever": params}, examples, progress="retrieve")
        if multihost.is_first():
            write_predictions(config.output, task, found, config.negatives)
        at = sorted({k for k in EvalConfig().recall_at if k <= config.k} | {config.k})
        return score(task, found, at)


def evaluate(config: EvalConfig) -> tuple[list[Found], dict[str, float]]:
    """Answer and score a file; write its predictions if EvalConfig says where.

    Raises:
      UserError: a setting or file at fault.
    """
    with _ready(config.passages) as (made, corpus):
        evaluation = make_evaluation(
            config, StepConfig(), made.models, made.tokenizers, corpus, made.mesh, made.rules
        )
        found, scores = evaluation.run(made.params)
    if config.predictions and multihost.is_first():
        write_predictions(config.predictions, evaluation.task, found)
    return found, scores


@dataclasses.dataclass(frozen=True)
class Asker:
    """Answers one typed question after the other; the first compiles the programs.

    A question asked again is sampled anew where GenerationConfig.method is 'sample'.
    """

    made: Assembled
    evaluator: Evaluator
    config: EvalConfig
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def ask(self, question: str) -> Found:
        """The answer with the passages that were read.

        Raises:
          UserError: the question is empty.
        """
        if not question.strip():
            raise UserError("the question is empty; type what you want to know")
        field = _QUESTION_FIELDS[self.config.task]
        record = Record("1", "the question", {field: question.strip()}, (), None, {})
        example = get_task(self.config.task).example(record)
        number = next(self.numbers)
        return self.evaluator(self.made.params, [example], progress="", first=number)[0]


@contextlib.contextmanager
def asker(config: EvalConfig) -> Iterator[Asker]:
    """Load models and corpus to answer questions.

    Takes task and passages from EvalConfig, k from StepConfig.

    Raises:
      UserError: a setting or file at fault.
    """
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
    step = StepConfig()
    with _ready(config.passages) as (made, corpus):
        models, mesh = made.models, made.mesh
        reranks = corpus is not None and step.rerank > 0
        wide, binding = (step.rerank, "StepConfig.rerank") if reranks else (step.k, "StepConfig.k")
        source = make_source(config.passages, corpus, wide, binding, models.retriever, mesh)
        reading = Reading(step.k, step.reader_length, explains=config.explain)
        rows = batch_sharding("", mesh.size, mesh, made.rules)  # one row for each device
        evaluator = Evaluator(
            batcher=Batcher(made.tokenizers, DataConfig(), corpus.store if corpus else None),
            batch_size=mesh.size,
            rows=rows,
            source=source,
            find=make_find(models.retriever, source, mesh, step.k if reranks else 0),
            answer=make_answer(models.reader, GenerationConfig(), reading, mesh),
            tokenizer=made.tokenizers.reader,
            store=corpus.store if corpus else None,
        )
        yield Asker(made, evaluator, config)


@contextlib.contextmanager
def _ready(passages: str) -> Iterator[tuple[Assembled, Corpus | None]]:
    """Models, and the corpus with its index if passages come from there."""
    with active_mesh() as (mesh, rules):
        made = assemble(ModelConfig(), mesh, rules)
        corpus = None
        if passages == "index":
            corpus = _load_corpus(
                CorpusConfig(),
                made.models.retriever,
                made.models.reader,
                made.params["retriever"],
                made.tokenizers,
                mesh,
                rules,
                reranks=StepConfig().rerank > 0,
            )
        yield made, corpus


def _load_corpus(
    config: CorpusConfig,
    retriever: DualEncoder,
    reader: T5 | None,
    params: Params,
    tokenizers: Tokenizers,
    mesh: Mesh,
    rules: tuple[Rule, ...],
    reranks: bool,
) -> Corpus:
    store = open_store(config, tokenizers)
    store.check_vocab(retriever=retriever.config.vocab_size)
    if reader is not None:
        store.check_vocab(reader=reader.config.vocab_size)
    embedder = Embedder(retriever, tokenizers.retriever, config, mesh, rules)
    corpus = Corpus(store, embedder, config, mesh, retriever_tokens=reranks)
    corpus.load_first(params)
    return corpus
