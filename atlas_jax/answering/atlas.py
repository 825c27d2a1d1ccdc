"""A loaded Atlas to ask, search and score with, for notebooks and commands."""

import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from atlas_jax.answering.answers import Reading, make_answer
from atlas_jax.answering.batcher import most_choices
from atlas_jax.answering.evaluation import (
    Evaluation,
    Finder,
    Rows,
    Search,
    make_evaluation,
    make_evaluator,
)
from atlas_jax.answering.evaluator import Evaluator, Found
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core import partitioning
from atlas_jax.core.deltas import merge_lora
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError, nearest
from atlas_jax.core.partitioning import batch_parts
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.corpus import Corpus, load_corpus
from atlas_jax.corpus.reader_states import PassageReader
from atlas_jax.models.assembly import Assembled, assemble, expectations, export_model
from atlas_jax.models.folder import base_of, partial_parts
from atlas_jax.models.parameters import Models
from atlas_jax.models.partial import Base
from atlas_jax.models.variants import variant
from atlas_jax.tasks.base import AsksTyped, Example

_WIDE_BATCH = 8  # questions are answered in two shapes; this is the larger number of rows


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage that was found for a question.

    Attributes:
      score: inner product of the question's and the passage's embedding.
      attention, alone, left_out: what the passage contributed to the answer, if explanations
        were asked for and it was read; see `answers.Evidence`.
    """

    id: str
    title: str
    section: str
    text: str
    score: float
    attention: float | None = None
    alone: float | None = None
    left_out: float | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question and the passages it was read from.

    Attributes:
      question: as it was asked.
      text: the answer.
      log_probability: of the answer's tokens. If the task has choices, of this choice among
        all of them.
      passages: those that were read, best first; none for a closed book.
    """

    question: str
    text: str
    log_probability: float
    passages: tuple[Passage, ...]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A file of questions, answered and scored.

    Attributes:
      scores: of the task, each from 0 to 1.
      found: passages and answer of each question, in the order of the file.
    """

    scores: dict[str, float]
    found: list[Found]

    @property
    def answers(self) -> list[Answer]:
        """The answers as `Atlas.ask` returns them; without text if nothing was read."""
        return [_answer(one.example.query_text, one) for one in self.found]


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The values that decide which compiled program answers a batch."""

    rows: int
    k: int
    explains: bool
    excluded: int
    choices: int
    reads: bool


class Atlas:
    """Reader, retriever and corpus, ready to answer.

    Each object has a mesh of its own. So any thread may call any method, and one process may hold
    several objects. A program is compiled once for each shape, see `warm_up`.
    """

    def __init__(self, told: AnswerRun) -> None:
        """Load everything; `atlas_jax.load` is the easier way.

        Raises:
          UserError: a setting or file is at fault.
        """
        self._told = told
        self._lock = threading.Lock()
        self._evaluators: dict[tuple[_Shape, Models], Evaluator] = {}
        self._variants: dict[str, Assembled] = {}  # by name; "" = as loaded
        self._bases: dict[str, Base] = {}
        self._expects = expectations(told.models.config)
        self._asked = 0  # number of questions so far, for sampled answers
        with use_devices(told.devices) as (mesh, rules):
            self._made: Assembled = assemble(told.models, mesh, rules)
            self._corpus: Corpus | None = None
            if told.evaluation.passages == "index":
                made = self._made
                self._corpus = load_corpus(
                    told.corpus,
                    made.models.retriever,
                    made.params["retriever"],
                    made.tokenizers,
                    mesh,
                    rules,
                    retriever_tokens=told.read.rerank > 0,
                    reader=PassageReader(
                        made.models.reader,
                        made.params["reader"],
                        told.read.reader_length,
                        told.data.query_length,
                    ),
                )
        self._variants[""] = self._made
        self._smallest = batch_parts(mesh, rules)

    def add(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Add a partial model folder that stands on these models, under a name.

        `ask`, `retrieve` and `evaluate` use it by ``delta=name``. It lies in memory beside the
        models, without a second copy of what it has in common with them, and folders of one form
        (equal adapters, say) share their compiled programs. Questions may be embedded in another
        way, passages may not: a folder with another passage tower is loaded by itself.

        Args:
          name: of one's own choice; a name that is taken is given to the new folder.
          folder: what a run wrote that trained a part, see docs/deltas.md.

        Raises:
          UserError: a folder at fault, or one that stands on other models.
        """
        if not name:
            raise UserError("add: a delta needs a name; '' is the model as it was loaded")
        with self._lock, self._active():
            config = self._told.models.config
            for part in () if self._bases else PARTS:
                own, base = (str(getattr(config, field)) for field in (part, f"{part}_base"))
                if not own or partial_parts({part: own}):
                    raise UserError(
                        f"add: the {part} that is loaded is no whole model folder"
                        f"{f' ({own})' if own else ''}; load the base of {os.fspath(folder)}, then "
                        "add it"
                    )
                self._bases[part] = base_of(own, part, base)[0]
            self._variants[name] = variant(self._made, self._bases, os.fspath(folder))

    @property
    def deltas(self) -> list[str]:
        """Names of what was added."""
        return [name for name in self._variants if name]

    @overload
    def ask(
        self,
        questions: str,
        *,
        k: int = 0,
        explain: bool = False,
        exclude: Sequence[str] = (),
        delta: str = "",
    ) -> Answer: ...

    @overload
    def ask(
        self,
        questions: list[str] | tuple[str, ...],
        *,
        k: int = 0,
        explain: bool = False,
        exclude: Sequence[str] = (),
        delta: str = "",
    ) -> list[Answer]: ...

    def ask(
        self,
        questions: str | list[str] | tuple[str, ...],
        *,
        k: int = 0,
        explain: bool = False,
        exclude: Sequence[str] = (),
        delta: str = "",
    ) -> Answer | list[Answer]:
        """Answer one question, or several at once.

        Args:
          questions: text; a list gives a list.
          k: passages that are read for each; 0 = as many as the model was loaded with.
          explain: also compute what each passage contributed to the answer.
          exclude: ids of passages that may not be read.
          delta: name of what was added, see `add`; "" = the model as it was loaded.

        Raises:
          UserError: an empty question, an unknown delta, a k above the number of
            passages, an unknown id, or a task whose questions cannot be typed.
        """
        if explain and self._corpus is None:
            raise UserError("explain: a closed book has no passages whose part could be told")
        asked = [questions] if isinstance(questions, str) else list(questions)
        examples = self._examples(asked, exclude)
        k = k or self._told.read.k
        found = self._found(examples, k, explain, reads=True, made=self._variant(delta))
        answers = [_answer(question, one) for question, one in zip(asked, found, strict=True)]
        return answers[0] if isinstance(questions, str) else answers

    @overload
    def retrieve(
        self, questions: str, *, k: int = 20, exclude: Sequence[str] = (), delta: str = ""
    ) -> list[Passage]: ...

    @overload
    def retrieve(
        self,
        questions: list[str] | tuple[str, ...],
        *,
        k: int = 20,
        exclude: Sequence[str] = (),
        delta: str = "",
    ) -> list[list[Passage]]: ...

    def retrieve(
        self,
        questions: str | list[str] | tuple[str, ...],
        *,
        k: int = 20,
        exclude: Sequence[str] = (),
        delta: str = "",
    ) -> list[Passage] | list[list[Passage]]:
        """Find the k best passages for each question, best first, without reading them.

        Raises:
          UserError: as `ask`, or if there is no corpus.
        """
        if self._corpus is None:
            raise UserError("there is no corpus to search: load passages, a store or an index")
        asked = [questions] if isinstance(questions, str) else list(questions)
        examples, made = self._examples(asked, exclude), self._variant(delta)
        found = self._found(examples, k, explain=False, reads=False, made=made)
        passages = [list(_passages(one)) for one in found]
        return passages[0] if isinstance(questions, str) else passages

    def evaluate(
        self, file: str | os.PathLike[str] = "", *, delta: str = "", **settings: Any
    ) -> Evaluated:
        """Answer and score a file of questions, in the layout of the task.

        Args:
          file: the file; "" = the one named when this was loaded.
          delta: as in `ask`.
          settings: other fields of `EvalConfig`, such as k, batch_size, generate or max_rows.

        Raises:
          UserError: the file or a setting is at fault.
        """
        fields = {**({"file": os.fspath(file)} if file else {}), **settings}
        known = {field.name for field in dataclasses.fields(self._told.evaluation)}
        if not set(fields) <= known - {"task", "predictions"}:
            odd = sorted(set(fields) - (known - {"task", "predictions"}))
            raise UserError(f"evaluate: no setting is called {odd[0]}; see EvalConfig")
        config = dataclasses.replace(self._told.evaluation, **fields)
        with self._active():
            made = self._variant(delta)
            found, scores = self._evaluation(config, made).run(made.params)
        return Evaluated(scores, found)

    def save(
        self, directory: str | os.PathLike[str], dtype: str = "float32", merge: bool = False
    ) -> None:
        """Write both models as a whole model folder; one that is there is replaced.

        Args:
          directory: the folder.
          dtype: 'float32' or 'bfloat16', in which parameters are stored.
          merge: add LoRA to the kernels that it stands beside, so that plain models are written.

        Raises:
          UserError: the folder could not be written, or there are adapters to be merged.
        """
        made = self._made
        with self._active():
            if merge:
                params = {part: merge_lora(params) for part, params in made.params.items()}
                plain = dataclasses.replace(made.models, deltas=())
                made = dataclasses.replace(made, models=plain, params=params)
            export_model(
                os.fspath(directory),
                made.models,
                made.params,
                made.tokenizers,
                dtype,
                about={},
                expects=self._expects,
            )

    def warm_up(self, *, k: int = 0, explain: bool = False, delta: str = "") -> None:
        """Compile the programs of `ask`, so that no question waits for them.

        Questions are answered in two shapes, for few and for many at a time. Another k, another
        `explain`, or questions with exclusions need further programs.
        """
        for rows in self._shapes():
            examples = self._examples(["warm up"] * rows, ())
            wanted, made = k or self._told.read.k, self._variant(delta)
            self._found(examples, wanted, explain, reads=True, made=made, counted=False)

    def _variant(self, delta: str) -> Assembled:
        if delta not in self._variants:
            raise UserError(
                f"no delta is called {delta!r}{nearest(delta, self.deltas)}; see Atlas.add"
            )
        return self._variants[delta]

    def _evaluation(self, config: Any, made: Assembled) -> Evaluation:
        told = dataclasses.replace(self._told, evaluation=config)
        return make_evaluation(
            told, made.models, made.tokenizers, self._corpus, made.mesh, made.rules
        )

    def _active(self) -> Any:
        return partitioning.activate(self._made.mesh, self._made.rules)

    def _shapes(self) -> tuple[int, int]:
        """Rows of the two shapes in which questions are answered."""
        few = self._smallest
        return few, few * max(1, -(-_WIDE_BATCH // few))

    def _examples(self, questions: Sequence[str], exclude: Sequence[str]) -> list[Example]:
        task = check_typed(self._told)
        for number, question in enumerate(questions, start=1):
            if not question.strip():
                where = f"question {number} of {len(questions)}" if len(questions) > 1 else ""
                raise UserError(f"{where or 'the question'} is empty; type what you want to know")
        known = self._corpus.store.find if self._corpus else lambda _: None
        unknown = [one for one in exclude if known(one) is None]
        if unknown:
            raise UserError(f"exclude: no passage of the corpus has the id {unknown[0]!r}")
        examples = [task.typed(question.strip()) for question in questions]
        return [
            dataclasses.replace(one, excluded_ids=(*one.excluded_ids, *exclude)) for one in examples
        ]

    def _found(
        self,
        examples: Sequence[Example],
        k: int,
        explain: bool,
        reads: bool,
        made: Assembled,
        counted: bool = True,
    ) -> list[Found]:
        if not examples:
            return []
        few, many = self._shapes()
        excluded = max(len(one.excluded_ids) for one in examples)
        shape = _Shape(
            rows=few if len(examples) <= few else many,
            k=k,
            explains=explain,
            # Rounded up to a power of two, so that few numbers of exclusions need a new program.
            excluded=max(self._told.data.max_excluded, 1 << max(0, excluded - 1).bit_length()),
            choices=most_choices(examples) if reads else 0,
            reads=reads,
        )
        with self._lock:
            program = shape, made.models
            if program not in self._evaluators:
                with self._active():
                    self._evaluators[program] = self._make(shape, made)
            first = self._asked
            self._asked += len(examples) if counted else 0
        with self._active():
            return self._evaluators[program](made.params, examples, progress="", first=first)

    def _make(self, shape: _Shape, made: Assembled) -> Evaluator:
        told = self._told
        answer = None
        if shape.reads:
            reading = Reading(
                shape.k, told.read.reader_length, shape.choices > 0, explains=shape.explains
            )
            answer = make_answer(made.models.reader, told.generation, reading, made.mesh)
        return make_evaluator(
            Finder(made.models.retriever, made.tokenizers, self._corpus, made.mesh, made.rules),
            Search(told.evaluation.passages, shape.k, told.read.rerank, "k"),
            Rows(shape.rows),
            dataclasses.replace(told.data, max_excluded=shape.excluded),
            answer,
            told.corpus.formats,
            shape.choices,
            told.generation.length_penalty,
        )


def check_typed(told: AnswerRun) -> AsksTyped:
    """Return the task if a person can type its questions.

    Raises:
      UserError: its questions need more than a line of text, or come with their passages.
    """
    task = told.task
    if told.evaluation.passages == "file":
        raise UserError(
            "EvalConfig.passages = 'file': a typed question brings no passages; "
            "use 'index', or 'none' for closed book"
        )
    if not isinstance(task, AsksTyped):
        raise UserError(
            f"EvalConfig.task = {task.name!r} is not for typed questions: they need more than a "
            "line of text (a task of your own takes one with a method `typed`)"
        )
    return task


def _answer(question: str, found: Found) -> Answer:
    score = found.log_probability if found.log_probability is not None else math.nan
    return Answer(question, found.answer or "", score, _passages(found))


def _passages(found: Found) -> tuple[Passage, ...]:
    return tuple(_passage(one) for one in found.passages)


def _passage(raw: Mapping[str, Any]) -> Passage:
    names: Iterator[str] = (field.name for field in dataclasses.fields(Passage))
    return Passage(**{name: raw[name] for name in names if name in raw})
