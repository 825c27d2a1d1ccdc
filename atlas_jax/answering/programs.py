"""The compiled programs of a loaded Atlas: one for each shape, made when it is first needed."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from atlas_jax.answering.answers import Reading
from atlas_jax.answering.asked import Asked, examples_of
from atlas_jax.answering.batcher import most_choices
from atlas_jax.answering.evaluation import Finder, Search, make_evaluator
from atlas_jax.answering.evaluator import Evaluator, Find
from atlas_jax.answering.packed_rows import Lengths, packed_rows, store_lengths
from atlas_jax.answering.run import AnswerRun
from atlas_jax.answering.writer import ToldAnswer, Writer, answer_of, whole_answer
from atlas_jax.core.widths import power_of_two
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.sources import Source
from atlas_jax.models.assembly import Assembled
from atlas_jax.models.parameters import Models
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.base import Example


@dataclasses.dataclass(frozen=True)
class Shape:
    """The values that decide which compiled program answers a batch.

    Attributes:
      rows: questions of the batch.
      k: passages that are read for each.
      searched: passages that are searched for each; 0 = k.
      excluded: passages that a question may exclude or edit, together.
      choices: answers that a question may choose from; 0 = answers are generated.
      edited: passages that a question may edit.
      limits: whether each question may read fewer than k passages.
      reads: False = passages are only found.
      decoding: the method of GenerationConfig; "" = as told.
    """

    rows: int
    k: int
    explains: bool = False
    excluded: int = 1
    choices: int = 0
    edited: int = 0
    searched: int = 0
    limits: bool = False
    reads: bool = True
    decoding: Literal["", "greedy", "beam", "sample"] = ""


def shape_of(
    examples: Sequence[Example], rows: int, k: int, explains: bool, reads: bool, least: int
) -> Shape:
    """The shape of one call's examples.

    Widths are rounded up to a power of two, so that few numbers of exclusions, edits or choices
    need a new program.

    Args:
      least: passages that a question may exclude at least, `DataConfig.max_excluded`.
    """
    edited = max(len(one.edited) for one in examples)
    excluded = max(len(one.excluded_ids) + len(one.edited) for one in examples)
    return Shape(
        rows=rows,
        k=k,
        explains=explains,
        excluded=max(least, power_of_two(excluded)),
        choices=most_choices(examples) if reads else 0,
        edited=power_of_two(edited) if edited else 0,
        reads=reads,
    )


class Programs:
    """Makes what answers batches of a shape, once; any thread may ask for it.

    Shapes that differ in rows share their functions, and so do shapes that find or write alike.
    """

    def __init__(self, told: AnswerRun, corpus: Corpus | None) -> None:
        self._told, self._corpus = told, corpus
        self._lock = threading.Lock()
        self._evaluators: dict[tuple[Shape, Models], Evaluator] = {}
        self._finds: dict[tuple[int, Models], tuple[Source, Find]] = {}
        self._answers: dict[tuple[Reading, GenerationConfig, Models], ToldAnswer] = {}
        self._writers: dict[tuple[Reading, GenerationConfig, Models], Writer] = {}
        self._rows: dict[tuple[int, int, Models], int] = {}  # that k passages share, by batch

    def of(self, shape: Shape, made: Assembled) -> Evaluator:
        """What answers batches of this shape by these models; the mesh has to be active.

        Raises:
          UserError: the corpus has fewer passages than the shape searches.
        """
        with self._lock:
            key = shape, made.models
            if key not in self._evaluators:
                self._evaluators[key] = self._make(shape, made)
            return self._evaluators[key]

    def compile_over(self, corpus: Corpus, variants: Sequence[Assembled]) -> None:
        """Compile what was used so far for a corpus whose index has another size.

        Only what finds passages depends on that size. No device computes.

        Args:
          corpus: with the shapes of its arrays, see `Corpus.planned`.
        """
        params = {made.models: made.params for made in variants}
        with self._lock:
            used = list(self._evaluators.items())
        for (shape, models), evaluator in used:
            (example,) = examples_of(self._told, [Asked("Is there room?")], corpus.store)
            if shape.choices and not example.choices:
                asked = Asked("Is there room?", choices=("yes", "no"))
                (example,) = examples_of(self._told, [asked], corpus.store)
            evaluator.over(corpus).compile(params[models], [example])

    def _make(self, shape: Shape, made: Assembled) -> Evaluator:
        told, searched = self._told, shape.searched or shape.k
        evaluator = make_evaluator(
            Finder(made.models.retriever, made.tokenizers, self._corpus, made.mesh, made.rules),
            Search(told.evaluation.passages, searched, told.read.rerank, "k", packing=told.read),
            shape.rows,
            dataclasses.replace(told.data, max_excluded=shape.excluded),
            self._answer(shape, made) if shape.reads else None,
            told.corpus.formats,
            shape.choices,
            told.generation.length_penalty,
            shape.limits,
            shape.edited,
        )
        key = searched, made.models
        source, find = self._finds.setdefault(key, (evaluator.source, evaluator.find))
        return dataclasses.replace(evaluator, source=source, find=find)

    def _answer(self, shape: Shape, made: Assembled) -> ToldAnswer:
        told, generation = self._told, self._told.generation
        if shape.decoding:
            generation = generation.by(shape.decoding)
        reader = made.models.reader
        chooses, rows = shape.choices > 0, self._packed_rows(shape, made.models)
        reading = Reading(shape.k, told.read.reader_length, chooses, packed_rows=rows)
        key = reading, generation, made.models
        if generation.method == "beam" or reading.chooses:
            whole = dataclasses.replace(reading, explains=shape.explains)
            key = whole, generation, made.models
            if key not in self._answers:
                self._answers[key] = whole_answer(reader, generation, whole, made.mesh)
            return self._answers[key]
        if key not in self._writers:
            self._writers[key] = Writer(reader, generation, reading, made.mesh)
        return answer_of(self._writers[key], shape.explains)

    def _packed_rows(self, shape: Shape, models: Models) -> int:
        """See `packed_rows`; the questions are unknown and taken to be as long as they may be."""

        def lengths() -> Lengths | None:
            if self._corpus is None:
                return None
            return np.array([self._told.data.query_length]), store_lengths(self._corpus.store)

        key = shape.k, shape.rows, models
        if key not in self._rows:
            self._rows[key] = packed_rows(self._told.read, models, shape.k, shape.rows, lengths)
        return self._rows[key]
