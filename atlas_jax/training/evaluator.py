"""Find, read, answer, score: a file of questions in batches of one static shape."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import EOS_ID, NO_ROW, PAD_ID, Batch, Params, Passages
from atlas_jax.index.passages import PassageStore
from atlas_jax.reader import fid
from atlas_jax.reader.generate import GenerationConfig, generate
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Example, Prediction, Task
from atlas_jax.tasks.registry import get_task
from atlas_jax.training.assembly import Tokenizers, batch_sharding
from atlas_jax.training.config import EvalConfig
from atlas_jax.training.corpus import Corpus
from atlas_jax.training.data import Batcher, DataConfig
from atlas_jax.training.sources import Source, make_source
from atlas_jax.training.state import Models
from atlas_jax.training.step import StepConfig, embed_query

Answer = Callable[[Params, Batch, Passages], tuple[jax.Array, jax.Array]]
Find = Callable[[Params, Any, Batch], Passages]


@dataclasses.dataclass(frozen=True)
class Found:
    """One example with what was retrieved and written for it.

    Attributes:
      example: the question.
      passages: {id, title, section, text, score}, best first.
      answer: the reader's text; None if nothing was generated.
      log_probability: of the answer's tokens; None likewise.
    """

    example: Example
    passages: tuple[Mapping[str, Any], ...]
    answer: str | None = None
    log_probability: float | None = None

    def row(self) -> dict[str, Any]:
        """A line of the predictions file."""
        example = self.example
        row: dict[str, Any] = {"id": example.id, **example.meta}
        if self.answer is not None:
            row |= {"prediction": self.answer, "log_probability": self.log_probability}
        return row | {
            "answers": list(example.answers),
            "gold": list(example.gold_ids),
            "passages": [dict(passage) for passage in self.passages],
        }


def make_find(retriever: DualEncoder, source: Source, mesh: Mesh) -> Find:
    """Build the jitted `find(params, from_source, batch) -> passages`."""

    def find(params: Params, from_source: Any, batch: Batch) -> Passages:
        # Where nothing is searched, the embedding is unused and drops out of the program.
        query_be = embed_query(retriever, params, batch)
        return source.retrieve(from_source, query_be, batch)

    return jax.jit(find, out_shardings=partitioning.replicated(mesh))


def make_answer(
    reader: T5, generation: GenerationConfig, k: int, reader_length: int, mesh: Mesh
) -> Answer:
    """Build the jitted `answer(params, batch, passages) -> (tokens_bt, scores_b)`.

    Args:
      k: passages that are read, the best of those found.
      reader_length: tokens of one reader input.
    """

    def answer(params: Params, batch: Batch, passages: Passages) -> tuple[jax.Array, jax.Array]:
        tokens_bkl = fid.join_inputs(
            batch.query_tokens_bq,
            passages.reader_tokens_bkl[:, :k],
            passages.mask_bk[:, :k],
            reader_length,
            EOS_ID,
        )
        enc_bkld = fid.encode(reader, params["reader"], tokens_bkl)
        fused = (enc_bkld.shape[0], enc_bkld.shape[1] * enc_bkld.shape[2])  # k passages, one source
        return generate(
            reader,
            params["reader"],
            enc_bkld.reshape(*fused, -1),
            (tokens_bkl != PAD_ID).reshape(fused),
            generation,
            jax.random.key(0) if generation.method == "sample" else None,
        )

    return jax.jit(answer, out_shardings=partitioning.replicated(mesh))


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Answers examples; its functions are compiled once for all calls.

    Attributes:
      batcher: makes batches.
      batch_size: rows per compiled call; the last batch is filled up to it.
      rows: how a batch lies over the mesh.
      source: where passages come from.
      find: see `make_find`.
      answer: see `make_answer`; None = retrieve only.
      tokenizer: the reader's.
      store: text of the index rows; None where nothing is searched.
    """

    batcher: Batcher
    batch_size: int
    rows: NamedSharding
    source: Source
    find: Find
    answer: Answer | None
    tokenizer: Tokenizer
    store: PassageStore | None

    def __call__(
        self, params: Params, examples: Sequence[Example], progress: str = "evaluate"
    ) -> list[Found]:
        """Answer the examples, in their order.

        Args:
          params: {"reader": ..., "retriever": ...}; the retriever alone if none is read.
          examples: at least one.
          progress: name of the progress bar; "" = none.
        """
        found: list[Found] = []
        starts = range(0, len(examples), self.batch_size)
        bar = tqdm(total=len(examples), desc=progress, unit="", disable=None if progress else True)
        with bar:
            waiting: tuple[Sequence[Example], Any] | None = None
            for start in starts:
                some = examples[start : start + self.batch_size]
                results = self._compute(params, self.batcher(some, self.batch_size))
                if waiting is not None:  # the devices work on the next batch meanwhile
                    found += self._read(*waiting)
                    bar.update(len(waiting[0]))
                waiting = (some, results)
            if waiting is not None:
                found += self._read(*waiting)
                bar.update(len(waiting[0]))
        return found

    def _compute(self, params: Params, batch: Batch) -> Any:
        batch = jax.device_put(batch, self.rows)
        passages = self.find(params, self.source.of_batch(params, batch), batch)
        answers = self.answer(params, batch, passages) if self.answer else None
        return passages.rows_bk, passages.scores_bk, passages.mask_bk, answers

    def _read(self, examples: Sequence[Example], results: Any) -> Iterator[Found]:
        rows_bk, scores_bk, mask_bk, answers = jax.device_get(results)
        texts = self.tokenizer.decode_batch(answers[0]) if answers else []
        for i, example in enumerate(examples):
            real = mask_bk[i] & (rows_bk[i] != NO_ROW)
            yield Found(
                example=example,
                passages=tuple(
                    {**self._passage(example, int(row)), "score": float(score)}
                    for row, score in zip(rows_bk[i][real], scores_bk[i][real], strict=True)
                ),
                answer=texts[i] if answers else None,
                log_probability=float(answers[1][i]) if answers else None,
            )

    def _passage(self, example: Example, row: int) -> Mapping[str, Any]:
        if self.store is not None:
            return self.store.passage(row)
        assert example.given_passages is not None
        return example.given_passages[row]


def score(task: Task, found: Sequence[Found], recall_at: Sequence[int]) -> dict[str, float]:
    """The task's scores of these answers, each between 0 and 1."""
    predictions = [Prediction(one.example, one.answer, one.passages) for one in found]
    return task.evaluate(predictions, recall_at)


def write_predictions(path: str | Path, found: Sequence[Found]) -> None:
    """Write one jsonl line per example, atomically.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        write_jsonl(path, (one.row() for one in found))
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from error


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A file of examples with everything to answer and score it, as often as wanted."""

    task: Task
    examples: Sequence[Example]
    evaluator: Evaluator
    recall_at: tuple[int, ...]

    def run(self, params: Params) -> tuple[list[Found], dict[str, float]]:
        """Answer all examples with these parameters; what was found, and the scores."""
        found = self.evaluator(params, self.examples)
        return found, score(self.task, found, self.recall_at)


def make_evaluation(
    config: EvalConfig,
    step: StepConfig,
    models: Models,
    tokenizers: Tokenizers,
    corpus: Corpus | None,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> Evaluation:
    """Build what EvalConfig describes; GenerationConfig and DataConfig come from gin.

    Args:
      config: file, task, mode.
      step: k and reader_length, as in training.
      corpus: needed where passages come from the index.

    Raises:
      UserError: the file or a setting at fault, naming it.
    """
    if not config.file:
        raise UserError("EvalConfig.file is not given: bind it to the file to evaluate on")
    task = get_task(config.task)
    records = task.load(config.file, need_targets=False)
    if config.max_rows:
        records = records[: config.max_rows]
    depth = max([*config.recall_at, step.k])
    binding = "StepConfig.k" if depth == step.k else "EvalConfig.recall_at"
    searched = corpus if config.passages == "index" else None
    source = make_source(config.passages, searched, depth, binding, models.retriever, mesh)
    answer = None
    if config.generate:
        answer = make_answer(models.reader, GenerationConfig(), step.k, step.reader_length, mesh)
    evaluator = Evaluator(
        batcher=Batcher(
            tokenizers,
            DataConfig(),
            searched.store if searched else None,
            given_passages=depth if config.passages == "file" else 0,
        ),
        batch_size=config.batch_size,
        rows=batch_sharding("EvalConfig.batch_size", config.batch_size, mesh, rules),
        source=source,
        find=make_find(models.retriever, source, mesh),
        answer=answer,
        tokenizer=tokenizers.reader,
        store=searched.store if searched else None,
    )
    examples = [task.example(record) for record in records]
    return Evaluation(task, examples, evaluator, config.recall_at)
