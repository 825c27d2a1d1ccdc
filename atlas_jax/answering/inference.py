"""The work of the commands that do not train: index a corpus, retrieve, evaluate."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.evaluation import Finder, Search, make_certify, make_evaluator
from atlas_jax.answering.evaluator import score, write_predictions
from atlas_jax.answering.results import Evaluated
from atlas_jax.answering.run import AnswerRun, IndexRun, RetrieveRun
from atlas_jax.answering.scorable import tell_unscorable
from atlas_jax.answering.truncation import tell_cut
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.objects import Objects
from atlas_jax.core.paths import check_output_file, check_output_folder, is_remote
from atlas_jax.corpus.change import SegmentEmbedder
from atlas_jax.corpus.embedder import Embedder
from atlas_jax.corpus.opening import check_store, load_corpus, open_store
from atlas_jax.corpus.rounding import built_dtype, needs_tokens
from atlas_jax.index.changes import Batch
from atlas_jax.index.int8 import dtype_of
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.saved import load_index
from atlas_jax.index.segment_indices import folder_of
from atlas_jax.models.assembly import (
    load_retriever,
    load_tokenizers,
)
from atlas_jax.tasks.base import evaluation_examples


def build_index(told: IndexRun) -> tuple[int, bool]:
    """Build the store and the index of CorpusConfig if they do not exist yet.

    Returns:
      How many passages the index holds, and whether they were embedded now. An index of the
      same passages, by the same passage tower and of the same type, is kept.

    Raises:
      UserError: a setting or file is at fault; earlier files are then unchanged.
    """
    config = told.corpus.config
    if not config.index:
        raise UserError("CorpusConfig.index is not given: bind it to the directory to write")
    for name, last in (("store", "manifest.json"), ("index", "index.json")):
        place = getattr(config, name)
        if place and not is_remote(place) and not Objects(place).has(last):
            check_output_folder(place, f"CorpusConfig.{name}")
    with use_devices(told.devices) as (mesh, rules):
        retriever, params, tokenizer = load_retriever(told.models)
        params = multihost.place(params, partitioning.replicated(mesh))
        store = open_store(told.corpus, load_tokenizers(told.models.config))
        check_store(store, retriever)
        embedder = Embedder(retriever, tokenizer, config, mesh, rules)
        made_by, built = embedder.hash(params), False
        dtype = built_dtype(config, store, embedder.width)
        for name, segment in zip(store.version["segments"], store.segments, strict=True):
            place = folder_of(config.index, segment, name)
            if not multihost.of_first(_is_there(place, dtype, segment, made_by)):
                embedder.to_directory(params, segment, place, 0, dtype)
                built = True
        return store.count, built


def change_index(told: IndexRun, batch: Batch) -> int:
    """Make the next version of the store and index of CorpusConfig; returns its number.

    Raises:
      UserError: a setting, id or passage is at fault; nothing is changed then.
    """
    with use_devices(told.devices) as (mesh, rules):
        retriever, params, _ = load_retriever(told.models)
        params = multihost.place(params, partitioning.replicated(mesh))
        tokenizers = load_tokenizers(told.models.config)
        embedder = SegmentEmbedder(retriever, params, tokenizers, told.corpus.config, mesh, rules)
        return embedder.change(batch)[0].version["version"]


def _is_there(place: Path, dtype: str, segment: PassageStore, encoder_hash: str) -> bool:
    try:
        found = load_index(place, segment, encoder_hash)
    except UserError:
        return False
    return dtype_of(found.embeddings_ne) == dtype


def retrieve(told: RetrieveRun) -> dict[str, float]:
    """Write the passages found for each question of a file; needs only the retriever.

    Returns:
      The task's retrieval scores, if the file has gold passages or answers.

    Raises:
      UserError: a setting or file at fault.
    """
    config, task = told.retrieve, told.task
    check_output_file(config.output, "RetrieveConfig.output")
    with use_devices(told.devices) as (mesh, rules):
        records = task.load(config.file, False, told.rows)
        retriever, params, _ = load_retriever(told.models)
        params = multihost.place(params, partitioning.replicated(mesh))
        tokenizers = load_tokenizers(told.models.config)
        corpus = load_corpus(
            told.corpus, retriever, params, tokenizers, mesh, rules, needs_tokens(config.rerank)
        )
        examples = evaluation_examples(task, records)
        tell_cut(config.file, examples, tokenizers, told.data, learnt=False)
        finder = Finder(retriever, tokenizers, corpus, mesh, rules)
        told_search = "index", config.k, config.rerank, "RetrieveConfig.k", "RetrieveConfig.rerank"
        search = Search(*told_search).over(corpus)
        evaluator = make_evaluator(
            finder,
            search,
            config.batch_size,
            told.data,
        )
        tell_unscorable(config.file, examples, False, corpus.store)
        certify = make_certify(evaluator, finder, examples, search, told.corpus.recall)
        certificate = certify({"retriever": params}) if certify else {}
        found = evaluator({"retriever": params}, examples, progress="retrieve")
        scores = score(
            task, found, sorted({k for k in told.recall_at if k <= config.k} | {config.k})
        )
        scores |= certificate
        with _scores_told(scores):
            if multihost.is_first():
                write_predictions(config.output, task, found, config.negatives)
        return scores


def evaluate(told: AnswerRun) -> Evaluated:
    """Answer and score a file; write its predictions if EvalConfig says where.

    Raises:
      UserError: a setting or file at fault.
    """
    if told.evaluation.predictions:
        check_output_file(told.evaluation.predictions, "EvalConfig.predictions")
    done = Atlas(told).evaluate()
    if told.evaluation.predictions and multihost.is_first():
        with _scores_told(done.scores):
            write_predictions(told.evaluation.predictions, told.task, done.found)
    return done


@contextlib.contextmanager
def _scores_told(scores: Mapping[str, float]) -> Iterator[None]:
    """If the predictions cannot be written, add the scores to the error: they took long."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; the scores are {json.dumps(scores)}") from error
