"""Build what answers a run's questions from its settings, in the same way for every command."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from atlas_jax.answering.answers import Answer, Reading, make_answer
from atlas_jax.answering.batcher import Batcher, DataConfig, most_choices
from atlas_jax.answering.evaluator import (
    Evaluator,
    Found,
    make_find,
    mean_loss,
    score,
    tokens_per_call,
)
from atlas_jax.answering.packed_rows import (
    lengths_of,
    packed_passages,
    packed_rows,
    store_lengths,
)
from atlas_jax.answering.run import AnswerRun
from atlas_jax.answering.scorable import tell_unscorable, within_corpus
from atlas_jax.answering.truncation import tell_cut
from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding, filled_batch
from atlas_jax.core.types import Params
from atlas_jax.corpus.config import ReadConfig, RecallConfig
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.recall import RecallCheck, sample
from atlas_jax.corpus.sources import make_source
from atlas_jax.index.int8 import INT8
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.models.parameters import Models
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Example, Task, evaluation_examples


@dataclasses.dataclass(frozen=True)
class Finder:
    """The parts that find passages.

    Attributes:
      corpus: what is searched; None if nothing is searched.
    """

    retriever: DualEncoder
    tokenizers: Tokenizers
    corpus: Corpus | None
    mesh: Mesh
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """Which passages a question gets.

    Attributes:
      passages: one of `corpus.config.PASSAGE_SOURCES`.
      k: number of passages that are kept.
      rerank: 0, or the number that is searched; the k best by fresh embeddings are kept. -1 = as
        the corpus asks for, see `over`.
      k_binding, rerank_binding: the bindings that set the two, for an error.
      packing: how passages that are scored anew share rows (`packed_passages`).
    """

    passages: str
    k: int
    rerank: int = 0
    k_binding: str = "StepConfig.k"
    rerank_binding: str = "StepConfig.rerank"
    packing: ReadConfig = ReadConfig(packed_rows=0)

    def over(self, corpus: Corpus | None) -> "Search":
        """This search with a number of passages that are scored anew, 0 = none."""
        searches = corpus is not None and self.passages == "index"
        found = corpus.rerank(self.rerank, self.k) if corpus and searches else 0
        return dataclasses.replace(self, rerank=found)


def make_evaluator(
    finder: Finder,
    search: Search,
    rows: int,
    data: DataConfig,
    answer: Answer | None = None,
    formats: StoreConfig = StoreConfig(),
    choices: int = 0,
    length_penalty: float = GenerationConfig().length_penalty,
    limits: bool = False,
    edited: int = 0,
) -> Evaluator:
    """Put together what finds passages for a batch of questions and answers from them.

    Args:
      rows: questions that are answered at a time; a batch is filled up to a multiple of the parts
        of the mesh.
      answer: writes the answers; None = passages are only found.
      formats: of passages that come with the questions.
      choices: see `Batcher`, as are `length_penalty`, `limits` and `edited`.

    Raises:
      UserError: the corpus has fewer passages than asked for; the binding is named.
    """
    corpus, mesh = finder.corpus if search.passages == "index" else None, finder.mesh
    search = search.over(corpus)
    reranks = search.rerank > 0
    wide, binding = search.k, search.k_binding
    if reranks and search.rerank > wide:
        wide, binding = search.rerank, search.rerank_binding
    source = make_source(search.passages, corpus, wide, binding, finder.retriever, mesh)
    store = corpus.store if corpus else None
    padded, shared = filled_batch(rows, mesh, finder.rules), 0
    if reranks and store is not None:
        sizes = wide, padded, store.retriever_tokens_nm.shape[1]
        shared = packed_passages(
            search.packing,
            *sizes,
            lambda: store_lengths(store, "retriever"),
        )
    return Evaluator(
        batcher=Batcher(
            finder.tokenizers,
            data,
            store,
            given_passages=search.k if search.passages == "file" else 0,
            formats=formats,
            choices=choices,
            length_penalty=length_penalty,
            limits=limits,
            edited=edited,
        ),
        batch_size=rows,
        padded=padded,
        rows=batch_sharding("the batch", padded, mesh, finder.rules),
        source=source,
        find=make_find(finder.retriever, source, mesh, search.k if reranks else 0, packed=shared),
        answer=answer,
        tokenizer=finder.tokenizers.reader,
        store=store,
    )


Certify = Callable[[Params], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A file of examples, with everything that answers and scores it, as often as wanted.

    Attributes:
      loss_rows: see `mean_loss`.
      certify: see `make_certify`.
      looks_up: whether answers are decoded with drafts, so that it is told how much they save.
    """

    task: Task
    examples: Sequence[Example]
    evaluator: Evaluator
    recall_at: tuple[int, ...]
    loss_rows: int = 0
    certify: Certify | None = None
    looks_up: bool = False

    def run(self, params: Params) -> tuple[list[Found], dict[str, float]]:
        """Answer all examples with these parameters; returns the answers, then the scores."""
        found = self.evaluator(params, self.examples)
        scores = score(self.task, found, self.recall_at) | mean_loss(found, self.loss_rows)
        if self.looks_up:
            scores |= tokens_per_call(found)
        return found, scores | (self.certify(params) if self.certify else {})


def make_certify(
    evaluator: Evaluator,
    finder: Finder,
    examples: Sequence[Example],
    search: Search,
    config: RecallConfig,
) -> Certify | None:
    """What tells the recall of an approximate search, from some of these examples.

    Args:
      search: what each gets, settled by `Search.over`.

    Returns:
      None where nothing is searched, or nobody wants to know. Its result is empty where the search
      is exact, or the exact embeddings lie in no file.
    """
    corpus = finder.corpus
    if corpus is None or not config.sample:
        return None
    rows = evaluator.batch_size
    wide = max(search.k, search.rerank)
    kept = search.k if search.rerank and corpus.dtype == INT8 else 0
    check = RecallCheck(
        corpus,
        finder.retriever,
        wide,
        finder.mesh,
        lambda b: multihost.place(b, evaluator.rows),
        kept,
    )

    def certify(params: Params) -> dict[str, float]:
        if not (corpus.is_approximate or kept):  # known once the index is loaded
            return {}
        if corpus.on_host and corpus.host_ne is None:
            print(
                "the recall of ScaNN's search is not known, since it keeps no exact embeddings; "
                "bind CorpusConfig.index to an index that `atlas-jax build_index` has made",
                file=sys.stderr,
            )
            return {}
        some = sample(examples, config)
        parts = (some[at : at + rows] for at in range(0, len(some), rows))
        return check.certificate(
            params, (evaluator.batcher(one, evaluator.padded) for one in parts), config
        )

    return certify


def make_evaluation(
    told: AnswerRun,
    models: Models,
    tokenizers: Tokenizers,
    corpus: Corpus | None,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Evaluation:
    """Build what EvalConfig describes.

    Args:
      told: file, task, mode, lengths. The sources of models and corpus in it are not used.
      corpus: needed where passages come from the index.

    Raises:
      UserError: the file or a setting at fault, naming it.
    """
    config = told.evaluation
    if not config.file:
        raise UserError("EvalConfig.file is not given: bind it to the file to evaluate on")
    records = told.task.load(config.file, False, told.rows)
    if config.max_rows:
        records = records[: config.max_rows]
    k = config.k or told.read.k
    searched = corpus if config.passages == "index" else None
    store = searched.store if searched else None
    recall_at = within_corpus(config.recall_at, store)
    examples = evaluation_examples(told.task, records)
    tell_unscorable(config.file, examples, config.generate, store)
    choices = most_choices(examples) if config.generate else 0
    answer = None
    if config.generate:
        targets = config.loss != "none" and any(e.target_text for e in examples)
        lengths = functools.partial(
            lengths_of, examples, tokenizers, told.data, told.corpus.formats, store
        )
        rows = packed_rows(told.read, models, k, config.batch_size, lengths)
        reading = Reading(k, told.read.reader_length, choices > 0, config.explain, targets, rows)
        answer = make_answer(models.reader, told.generation, reading, mesh)
    finder, wide = Finder(models.retriever, tokenizers, searched, mesh, rules), max([*recall_at, k])
    k_binding = "EvalConfig.k" if config.k else "StepConfig.k"
    search = Search(config.passages, wide, told.read.rerank, k_binding, packing=told.read)
    search = search.over(searched)
    evaluator = make_evaluator(
        finder,
        search,
        config.batch_size,
        told.data,
        answer,
        told.corpus.formats,
        choices,
        told.generation.length_penalty,
    )
    evaluator.batcher.check(examples, config.file)
    tell_cut(config.file, examples, tokenizers, told.data, learnt=False)
    loss_rows = config.batch_size if config.loss == "batches" else 0
    certify = make_certify(evaluator, finder, examples, search, told.corpus.recall)
    looks_up = told.generation.lookup_tokens > 0
    return Evaluation(told.task, examples, evaluator, recall_at, loss_rows, certify, looks_up)
