"""Find, read, answer, score: a file of questions in batches of one static shape."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atlas_jax.answering.answers import Answer, Answers
from atlas_jax.answering.batcher import Batcher
from atlas_jax.answering.surface import as_written
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.progress import show_progress
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import NO_ROW, PAD_ID, Batch, Params, Passages
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.retrieval import at_most, rerank, with_edited
from atlas_jax.corpus.sources import DeviceSource, HostSource, Source
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.towers import embed_query
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import AddsToRows, Example, Prediction, Task
from atlas_jax.tasks.metrics import answer_in_passage

OnTexts = Callable[[list[str]], None]
Find = Callable[[Params, Any, Batch], Passages]


@dataclasses.dataclass(frozen=True)
class Found:
    """One example with its passages and its answer.

    Attributes:
      example: the question.
      passages: {id, title, section, text, score}, best first; with explanations also
        {attention, alone, left_out}, see `answering.Evidence`.
      answer: the reader's text, or the best choice; None if nothing was read.
      log_probability: of the answer's tokens, or of this choice among all choices; None if
        nothing was read.
      choice_log_probs: of each of the example's choices.
      target_log_probability: of the example's own target; None if it was not asked for.
      target_tokens: number of tokens that it sums over.
      written_tokens: of a generated answer, the end token included.
      decoder_calls: how often the decoder was called for them; 0 where no answer was generated, or
        one was found by beam search.
    """

    example: Example
    passages: tuple[Mapping[str, Any], ...]
    answer: str | None = None
    log_probability: float | None = None
    choice_log_probs: tuple[float, ...] = ()
    target_log_probability: float | None = None
    target_tokens: int = 0
    written_tokens: int = 0
    decoder_calls: int = 0

    def prediction(self) -> Prediction:
        """The part that the task scores."""
        return Prediction(self.example, self.answer, self.passages, self.choice_log_probs)

    def row(self) -> dict[str, Any]:
        """A line of the predictions file."""
        example = self.example
        row: dict[str, Any] = {"id": example.id, **example.meta}
        if self.answer is not None:
            row |= {"prediction": self.answer, "log_probability": self.log_probability}
        if self.choice_log_probs:
            row["choices"] = [
                {"answer": choice.answer, "log_probability": value}
                for choice, value in zip(example.choices, self.choice_log_probs, strict=True)
            ]
        return row | {
            "answers": list(example.answers),
            "gold": list(example.gold_ids),
            "passages": [dict(passage) for passage in self.passages],
        }


def make_find(
    retriever: DualEncoder,
    source: Source,
    mesh: Mesh,
    rerank_to: int = 0,
    rows: NamedSharding | None = None,
    packed: int = 0,
) -> Find:
    """Build the jitted `find(params, from_source, batch) -> passages`.

    Args:
      rerank_to: 0, or how many of the passages found are kept: the best by fresh embeddings
        (`retrieval.rerank`).
      rows: the sharding of what is found over its queries; None = every device holds all of it.
      packed: rows that the passages found for a query share while they are scored anew.
    """

    def find(params: Params, from_source: Any, batch: Batch) -> Passages:
        # If nothing is searched the embedding is unused, and the compiler removes it.
        query_be = embed_query(retriever, params, batch)
        passages = source.retrieve(from_source, query_be, batch)
        if rerank_to:
            towers = retriever, params["retriever"]
            passages = rerank(*towers, query_be, passages, rerank_to, packed)
        if batch.edited is not None:
            towers = retriever, params["retriever"]
            passages = with_edited(*towers, query_be, passages, batch.edited)
        return passages if batch.k_b is None else at_most(passages, batch.k_b)

    return jax.jit(find, out_shardings=rows or partitioning.replicated(mesh))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Answers examples. Its functions are compiled once for all calls.

    Attributes:
      batcher: makes batches.
      batch_size: examples per compiled call.
      padded: rows of that call; more than examples where these do not divide over the mesh.
      rows: sharding of a batch.
      source: where passages come from.
      find: see `make_find`.
      answer: see `answering.make_answer`; None = retrieve only.
      tokenizer: the reader's.
      store: text of the index rows; None where nothing is searched.
    """

    batcher: Batcher
    batch_size: int
    padded: int
    rows: NamedSharding
    source: Source
    find: Find
    answer: Answer | None
    tokenizer: Tokenizer
    store: PassageStore | None

    def __call__(
        self,
        params: Params,
        examples: Sequence[Example],
        progress: str = "evaluate",
        first: int = 0,
    ) -> list[Found]:
        """Answer the examples, in their order.

        Args:
          params: {"reader": ..., "retriever": ...}; the retriever alone if none is read.
          examples: at least one.
          progress: name of the progress bar; "" = no bar.
          first: number of the first example, for sampled answers.
        """
        found: list[Found] = []
        starts = range(0, len(examples), self.batch_size)
        shown = bool(progress) and multihost.is_first()
        bar = show_progress(progress, total=len(examples), shown=shown)
        with bar:
            waiting: tuple[Sequence[Example], Any] | None = None
            for start in starts:
                some = examples[start : start + self.batch_size]
                results = self._compute(params, some, first + start)
                if waiting is not None:  # the devices work on the next batch meanwhile
                    found += self._read(*waiting)
                    bar.update(len(waiting[0]))
                waiting = (some, results)
            if waiting is not None:
                found += self._read(*waiting)
                bar.update(len(waiting[0]))
        return found

    def over(self, corpus: Corpus) -> "Evaluator":
        """The same compiled programs over another corpus, whose index has the same shape."""
        assert isinstance(self.source, DeviceSource | HostSource)
        return dataclasses.replace(
            self,
            batcher=self.batcher.over(corpus.store),
            source=self.source.over(corpus),
            store=corpus.store,
        )

    def compile(self, params: Params, examples: Sequence[Example]) -> None:
        """Compile what finds the passages of a batch like this one; nothing is searched."""
        batch = self._placed(examples)
        find: Any = self.find
        find.lower(params, self.source.of_batch(params, batch), batch).compile()

    def stages(
        self,
        params: Params,
        examples: Sequence[Example],
        first: int = 0,
        on_texts: OnTexts | None = None,
    ) -> Iterator[list[Found]]:
        """Answer one batch in two stages: the passages as soon as they are found, then all.

        Args:
          examples: from one to ``batch_size``.
          first: as in `__call__`.
          on_texts: called after each token with each answer so far, where it is known before the
            end; for an evaluator of `Programs`.
        """
        found = self._find(params, examples)
        passages = list(self._read(examples, (*_kept(found[1]), None)))
        yield passages
        if self.answer is not None:
            answers = self._answer(params, *found, first, self._on_tokens(passages, on_texts))
            yield list(self._read(examples, (*_kept(found[1]), answers)))

    def _compute(self, params: Params, examples: Sequence[Example], first: int) -> Any:
        found = self._find(params, examples)
        return (*_kept(found[1]), self._answer(params, *found, first))

    def _placed(self, examples: Sequence[Example]) -> Batch:
        """The batch of some examples on the mesh; each process tokenises what its devices hold."""
        mine = multihost.local_rows(self.rows, self.padded)
        batch = self.batcher(examples, self.padded, mine)
        placed: Batch = multihost.place_rows(batch, self.rows, self.padded)
        return placed

    def _find(self, params: Params, examples: Sequence[Example]) -> tuple[Batch, Passages]:
        batch = self._placed(examples)
        return batch, self.find(params, self.source.of_batch(params, batch), batch)

    def _answer(
        self,
        params: Params,
        batch: Batch,
        passages: Passages,
        first: int,
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> Answers | None:
        if self.answer is None:
            return None
        # The number is an array: one program serves all of them.
        told = {"on_tokens": on_tokens} if on_tokens else {}
        return self.answer(params, batch, passages, np.uint32(first), **told)

    def _on_tokens(
        self, found: Sequence[Found], on_texts: OnTexts | None
    ) -> Callable[[np.ndarray], None] | None:
        if on_texts is None:
            return None

        def told(tokens_bt: np.ndarray) -> None:
            texts = self.tokenizer.decode_batch(tokens_bt[: len(found)])
            on_texts([self._spelt(t, one.passages) for t, one in zip(texts, found, strict=True)])

        return told

    def _spelt(self, text: str, passages: Sequence[Mapping[str, Any]]) -> str:
        """The text as the passages spell it, for a tokenizer that loses their spelling."""
        if not self.tokenizer.lowercases:
            return text
        return as_written(text, (p[name] for p in passages for name in ("text", "title")))

    def _read(self, examples: Sequence[Example], results: Any) -> Iterator[Found]:
        rows_bk, scores_bk, mask_bk, answers = jax.device_get(results)
        mask_bk = mask_bk & (rows_bk != NO_ROW)
        stored = self._stored(np.unique(rows_bk[: len(examples)][mask_bk[: len(examples)]]))
        texts = self.tokenizer.decode_batch(answers.tokens_bt) if answers else []
        for i, example in enumerate(examples):
            at = np.flatnonzero(mask_bk[i])
            passages = tuple(
                {
                    **_passage(example, int(rows_bk[i][j]), stored),
                    "score": float(scores_bk[i][j]),
                    **_evidence(answers, i, int(j)),
                }
                for j in at
            )
            if answers is None:
                yield Found(example, passages)
                continue
            text, chosen = texts[i], ()
            if answers.choice_log_probs_bc is not None:
                chosen = tuple(answers.choice_log_probs_bc[i][: len(example.choices)].tolist())
                text = example.choices[int(np.argmax(chosen))].answer
            else:
                text = self._spelt(text, passages)
            found = Found(example, passages, text, float(answers.scores_b[i]), chosen)
            if answers.calls_b is not None:
                written = int(np.sum(answers.tokens_bt[i] != PAD_ID))
                calls = int(answers.calls_b[i])
                found = dataclasses.replace(found, written_tokens=written, decoder_calls=calls)
            if answers.target_log_probs_b is not None and example.target_text:
                scored = float(answers.target_log_probs_b[i]), int(answers.target_lengths_b[i])
                found = dataclasses.replace(
                    found, target_log_probability=scored[0], target_tokens=scored[1]
                )
            yield found

    def _stored(self, rows: np.ndarray) -> Mapping[int, Mapping[str, Any]] | None:
        """The passages of index rows, each read by one process; None where nothing is searched."""
        if self.store is None:
            return None
        wanted = rows.tolist()
        return dict(zip(wanted, multihost.divided(wanted, self.store.passages), strict=True))


def _passage(
    example: Example, row: int, stored: Mapping[int, Mapping[str, Any]] | None
) -> Mapping[str, Any]:
    """The passage of a row, as the example edits it, or the one that the example brought along."""
    if stored is not None:
        found = stored[row]
        return next((one for one in example.edited if one["id"] == found["id"]), found)
    assert example.given_passages is not None
    return example.given_passages[row]


def _kept(passages: Passages) -> tuple[Any, Any, Any]:
    """What is told about the passages found."""
    return passages.rows_bk, passages.scores_bk, passages.mask_bk


def _evidence(answers: Answers | None, row: int, passage: int) -> dict[str, float]:
    """The predictions file's fields about a passage; none for one that was not read."""
    evidence = answers.evidence if answers else None
    if evidence is None or passage >= evidence.attention_bk.shape[1]:
        return {}
    return {
        name.removesuffix("_bk"): float(values[row, passage])
        for name, values in vars(evidence).items()
    }


def score(task: Task, found: Sequence[Found], recall_at: Sequence[int]) -> dict[str, float]:
    """The task's scores of these answers, each between 0 and 1."""
    return task.evaluate([one.prediction() for one in found], recall_at)


def mean_loss(found: Sequence[Found], rows: int) -> dict[str, float]:
    """`loss`: mean negative log-likelihood of a target token, empty without targets.

    Args:
      rows: 0 = the mean over the tokens of all targets. Else, as Atlas reports it, the mean over
        batches of this many rows of each batch's mean over its tokens.
    """
    batches = [found[at : at + rows] for at in range(0, len(found), rows)] if rows else [found]
    means = []
    for batch in batches:
        scored = [one for one in batch if one.target_log_probability is not None]
        tokens = sum(one.target_tokens for one in scored)
        if tokens:
            means.append(-sum(one.target_log_probability or 0.0 for one in scored) / tokens)
    return {"loss": float(np.mean(means))} if means else {}


def tokens_per_call(found: Sequence[Found]) -> dict[str, float]:
    """`tokens_per_call`: tokens of all answers by calls of the decoder; empty without calls."""
    calls = sum(one.decoder_calls for one in found)
    return {"tokens_per_call": sum(one.written_tokens for one in found) / calls} if calls else {}


def write_predictions(
    path: str | Path, task: Task, found: Sequence[Found], negatives: int = 0
) -> None:
    """Write one jsonl line per example, atomically, with the fields that the task adds.

    Args:
      negatives: most `negatives` in a line, see RetrieveConfig.

    Raises:
      UserError: the file cannot be written.
    """

    def row(one: Found) -> dict[str, Any]:
        own = task.row_fields(one.prediction()) if isinstance(task, AddsToRows) else {}
        hard = {"negatives": _negatives(one)[:negatives]} if negatives else {}
        return {**one.row(), **own, **hard}

    try:
        write_jsonl(path, map(row, found))
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error


def _negatives(found: Found) -> list[str]:
    """Ids of found passages that are not gold and contain no accepted answer."""
    example = found.example
    return [
        passage["id"]
        for passage in found.passages
        if passage["id"] not in example.gold_ids
        and not answer_in_passage(f"{passage['title']} {passage['text']}", example.answers)
    ]
