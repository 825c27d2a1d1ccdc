"""A loaded Atlas to ask, search and score with, for notebooks and commands."""

import contextlib
import dataclasses
import os
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from atlas_jax.answering.asked import Asked, examples_of
from atlas_jax.answering.evaluation import Evaluation, make_evaluation
from atlas_jax.answering.evaluator import Found, OnTexts
from atlas_jax.answering.hot_changes import HotChanges
from atlas_jax.answering.programs import Programs, Shape, shape_of
from atlas_jax.answering.results import Answer, Evaluated, Passage, answer_of, passages_of
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core import partitioning
from atlas_jax.core.deltas import merge_lora
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError, nearest
from atlas_jax.core.partitioning import batch_parts
from atlas_jax.core.parts import PARTS
from atlas_jax.core.turns import Turns
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.corpus.opening import load_corpus
from atlas_jax.corpus.reader_states import PassageReader
from atlas_jax.corpus.rounding import needs_tokens
from atlas_jax.index.changes import Batch
from atlas_jax.index.living import LivingStore
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import Assembled, assemble, expectations, export_model
from atlas_jax.models.folder import base_of, partial_parts
from atlas_jax.models.partial import Base
from atlas_jax.models.variants import variant
from atlas_jax.tasks.base import Example

_WIDE_BATCH = 8  # questions are answered in two shapes; this is the larger number of rows
NO_TEXTS: Mapping[str, str] = types.MappingProxyType({})


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
        self._turns = Turns()
        self._changes: HotChanges | None = None
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
                    retriever_tokens=needs_tokens(told.read.rerank),
                    reader=PassageReader(
                        made.models.reader,
                        made.params["reader"],
                        told.read.reader_length,
                        told.data.query_length,
                    ),
                )
        self._variants[""] = self._made
        self._programs = Programs(told, self._corpus)
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

    def change_passages(
        self,
        *,
        add: Sequence[Mapping[str, Any]] = (),
        replace: Sequence[Mapping[str, Any]] = (),
        delete: Sequence[str] = (),
    ) -> int:
        """Change the passages that are searched, on the disk and on the devices, in one batch.

        One batch is one version of the store, see docs/living_index.md. When this returns the
        version is safe on the disk, and the next question sees it. A question sees all of a batch
        or nothing of it. Up to ``CorpusConfig.capacity`` nothing is compiled anew. Batches that are
        being answered are waited for; embedding happens before.

        All processes of a run must call it with the same batch. A question of one process is
        answered by the devices of all, so it has the same number in each: it sees the same version
        everywhere. There questions wait for the embedding, too.

        Args:
          add: passages ``{id, title?, section?, text}`` with new ids.
          replace: passages whose ids the corpus has.
          delete: ids that the corpus has.

        Returns:
          The number of the version.

        Raises:
          UserError: an id or a passage is at fault; the store was changed elsewhere; there is no
            corpus, or ScaNN searches one whose index is not saved; or another process failed or is
            missing, whose number is told. Nothing is changed then.
        """
        corpus = self._corpus
        if corpus is None:
            raise UserError("there is no corpus to change: load passages, a store or an index")
        corpus.check_hot()
        with self._lock:
            if self._changes is None:
                told = self._told, corpus, self._programs, self._variants, self._turns
                self._changes = HotChanges(*told)
        return self._changes.change(Batch(add, replace, delete))

    def add_passages(self, passages: Sequence[Mapping[str, Any]]) -> int:
        """Add passages with new ids as one version; see `change_passages`."""
        return self.change_passages(add=passages)

    def replace_passages(self, passages: Sequence[Mapping[str, Any]]) -> int:
        """Give passages another text as one version; see `change_passages`."""
        return self.change_passages(replace=passages)

    def delete_passages(self, ids: Sequence[str]) -> int:
        """Delete passages as one version; see `change_passages`."""
        return self.change_passages(delete=ids)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, `store` and `passages_version` stay as they are.

        Methods of this object that search may not be called in it.
        """
        return self._turns.reading()

    @property
    def passages_version(self) -> int:
        """Version of the store that is searched; 0 = as it was built."""
        store = self.store
        return store.version["version"] if isinstance(store, LivingStore) else 0

    def earlier(self, as_of: str) -> Corpus:
        """The passages as of a version or a time, for `ask_in`; nothing is compiled for them.

        They lie in memory beside those of today until the result is dropped. To ask nothing but
        an earlier version, use ``as_of`` of `atlas_jax.load`.

        Raises:
          UserError: there is no corpus or no such version, its embeddings are not saved, or it
            has more passages than there is room for.
        """
        if self._corpus is None:
            raise UserError("as_of: a closed book has no versions; load passages with a store")
        with self._active():
            return self._corpus.earlier(as_of)

    @property
    def keeps_earlier(self) -> bool:
        """Whether `earlier` can load a version of the passages."""
        return self._corpus is not None and self._corpus.keeps_earlier

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
        replace: Mapping[str, str] = NO_TEXTS,
        choices: Sequence[str] = (),
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
        replace: Mapping[str, str] = NO_TEXTS,
        choices: Sequence[str] = (),
        delta: str = "",
    ) -> list[Answer]: ...

    def ask(
        self,
        questions: str | list[str] | tuple[str, ...],
        *,
        k: int = 0,
        explain: bool = False,
        exclude: Sequence[str] = (),
        replace: Mapping[str, str] = NO_TEXTS,
        choices: Sequence[str] = (),
        delta: str = "",
    ) -> Answer | list[Answer]:
        """Answer one question, or several at once.

        Args:
          questions: text; a list gives a list.
          k: passages that are read for each; 0 = as many as the model was loaded with.
          explain: also compute what each passage contributed to the answer.
          exclude: ids of passages that may not be read.
          replace: texts by id of passages, which are found and read instead of the passages' own.
            The corpus itself stays as it is.
          choices: texts, the likeliest of which is the answer; () = it is generated.
          delta: name of what was added, see `add`; "" = the model as it was loaded.

        Raises:
          UserError: an empty question, an unknown delta, a k above the number of
            passages, an unknown id, or a task whose questions cannot be typed or take no choices.
        """
        if explain and self._corpus is None:
            raise UserError("explain: a closed book has no passages whose part could be told")
        texts = [questions] if isinstance(questions, str) else list(questions)
        asked = [Asked(text, 0, exclude, replace, choices) for text in texts]
        k = k or self._told.read.k
        with self._turns.reading():
            examples = examples_of(self._told, asked, self.store)
            found = self._found(examples, k, explain, reads=True, made=self._variant(delta))
        answers = [answer_of(text, one) for text, one in zip(texts, found, strict=True)]
        return answers[0] if isinstance(questions, str) else answers

    def ask_in(
        self,
        shape: Shape,
        asked: Sequence[Asked],
        on_found: Callable[[list[tuple[Passage, ...]]], None] = lambda _: None,
        corpus: Corpus | None = None,
        on_texts: OnTexts | None = None,
    ) -> list[Answer]:
        """Answer up to `shape.rows` questions in one compiled shape, as a server does.

        Args:
          shape: the program; it is compiled if it was not used before.
          asked: questions that fit it.
          on_found: called with each question's passages as soon as they are found.
          corpus: an `earlier` one that is searched instead; None = the newest.
          on_texts: called after each token with the answers so far; not for choices or beam search.

        Returns:
          The answers; without text and likelihood if the shape does not read.

        Raises:
          UserError: as `ask`.
        """
        with self._turns.reading(), self._active():
            examples = examples_of(self._told, asked, corpus.store if corpus else self.store)
            program, first = self._programs.of(shape, self._made), self._count(len(examples))
            program = program.over(corpus) if corpus else program
            found: list[Found] = []
            stages = program.stages(self._made.params, examples, first, on_texts)
            for number, found in enumerate(stages):
                if number == 0:
                    on_found([passages_of(one) for one in found])
        return [answer_of(one.text, each) for one, each in zip(asked, found, strict=True)]

    @overload
    def retrieve(
        self,
        questions: str,
        *,
        k: int = 20,
        exclude: Sequence[str] = (),
        replace: Mapping[str, str] = NO_TEXTS,
        delta: str = "",
    ) -> list[Passage]: ...

    @overload
    def retrieve(
        self,
        questions: list[str] | tuple[str, ...],
        *,
        k: int = 20,
        exclude: Sequence[str] = (),
        replace: Mapping[str, str] = NO_TEXTS,
        delta: str = "",
    ) -> list[list[Passage]]: ...

    def retrieve(
        self,
        questions: str | list[str] | tuple[str, ...],
        *,
        k: int = 20,
        exclude: Sequence[str] = (),
        replace: Mapping[str, str] = NO_TEXTS,
        delta: str = "",
    ) -> list[Passage] | list[list[Passage]]:
        """Find the k best passages for each question, best first, without reading them.

        Raises:
          UserError: as `ask`, or if there is no corpus.
        """
        if self._corpus is None:
            raise UserError("there is no corpus to search: load passages, a store or an index")
        texts = [questions] if isinstance(questions, str) else list(questions)
        asked = [Asked(text, 0, exclude, replace) for text in texts]
        made = self._variant(delta)
        with self._turns.reading():
            examples = examples_of(self._told, asked, self.store)
            found = self._found(examples, k, explain=False, reads=False, made=made)
        passages = [list(passages_of(one)) for one in found]
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
        with self._turns.reading(), self._active():
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
            examples = examples_of(self._told, [Asked("warm up")] * rows, self.store)
            wanted, made = k or self._told.read.k, self._variant(delta)
            with self._turns.reading():
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

    @property
    def told(self) -> AnswerRun:
        """The settings that it was loaded with."""
        return self._told

    @property
    def made(self) -> Assembled:
        """Models, parameters and tokenizers."""
        return self._made

    @property
    def store(self) -> PassageStore | None:
        """The passages that are searched; None for a closed book."""
        return self._corpus.store if self._corpus else None

    @property
    def index_version(self) -> int:
        """How often the embeddings that are searched have been refreshed."""
        return self._corpus.version if self._corpus else 0

    @property
    def fewest_rows(self) -> int:
        """Rows of the smallest batch, of which every batch has a multiple: the mesh decides it."""
        return self._smallest

    def _shapes(self) -> tuple[int, int]:
        """Rows of the two shapes in which questions are answered."""
        few = self._smallest
        return few, few * max(1, -(-_WIDE_BATCH // few))

    def _count(self, questions: int) -> int:
        """The number of the first of these questions; those asked later have higher ones."""
        with self._lock:
            self._asked += questions
            return self._asked - questions

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
        rows = few if len(examples) <= few else many
        shape = shape_of(examples, rows, k, explain, reads, self._told.data.max_excluded)
        with self._active():
            program = self._programs.of(shape, made)
            first = self._count(len(examples) if counted else 0)
            return program(made.params, examples, progress="", first=first)
