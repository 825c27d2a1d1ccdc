"""Answers batches of questions in a few shapes, all of which are compiled beforehand."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from atlas_jax.answering.asked import Asked, check_typed
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.evaluator import OnTexts
from atlas_jax.answering.programs import Shape
from atlas_jax.answering.results import Answer, Passage
from atlas_jax.core.errors import UserError
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.schemas import Decoding
from atlas_jax.tasks.base import AsksChoices

OnFound = Callable[[list[tuple[Passage, ...]]], None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the questions of one batch have in common.

    Attributes:
      k: passages of the program, one of those that are compiled.
      reads, explains, chooses, edits: what is done with them.
      decoding: the method; "" = as configured.
    """

    k: int
    reads: bool = True
    explains: bool = False
    chooses: bool = False
    edits: bool = False
    decoding: Decoding = ""


class Engine:
    """A loaded Atlas in the shapes of a `ServeConfig`.

    Attributes:
      atlas: the models and the corpus.
      ks, batch_rows: of the compiled shapes, ascending.
      takes_choices: whether a question may come with choices.
      deepest: the most passages that a question can get.
    """

    def __init__(self, atlas: Atlas, config: ServeConfig) -> None:
        """Choose the shapes; `compile` makes their programs."""
        self.atlas, self._config = atlas, config
        store, fewest = atlas.store, atlas.fewest_rows
        task = check_typed(atlas.told)
        self._own_choices = len(task.typed("Is everything warm?").choices)
        self.takes_choices = config.max_choices > 0 and isinstance(task, AsksChoices)
        most = store.count if store else 1
        self.ks = sorted({min(k, most) for k in config.ks})
        self.deepest = self.ks[-1]
        self.batch_rows = sorted({math.ceil(rows / fewest) * fewest for rows in config.batch_rows})
        self._shapes = {
            (kind, rows): self._shape(kind, rows)
            for kind, rows in itertools.product(self._kinds(), self.batch_rows)
        }
        self._seconds: dict[tuple[Kind, int], float] = {}  # of each shape, once compiled

    def kind(
        self, asked: Asked, reads: bool = True, explains: bool = False, decoding: Decoding = ""
    ) -> Kind:
        """The kind of a question.

        Raises:
          UserError: it asks for more than the server was told to compile.
        """
        config = self._config
        k = self.k_of(asked)
        if k > self.deepest:
            raise UserError(
                f"k = {k}: this server finds up to {self.deepest} passages (ServeConfig.ks)"
            )
        if explains and not (config.explain and self.atlas.store):
            raise UserError(
                "explain: this server has ServeConfig.explain = False"
                if self.atlas.store
                else "explain: a closed book has no passages whose part could be told"
            )
        for name, given, most in (
            ("exclude", asked.exclude, config.max_excluded),
            ("replace", asked.replace, config.max_replaced),
            ("choices", asked.choices, config.max_choices),
        ):
            if len(given) > most:
                raise UserError(
                    f"{name} has {len(given)} entries: this server takes up to {most} "
                    f"(ServeConfig.max_{_LIMITED[name]})"
                )
        if decoding == self.atlas.told.generation.method:
            decoding = ""
        if decoding not in ("", *config.decoding):
            known = (self.atlas.told.generation.method, *config.decoding)
            raise UserError(
                f"decoding = {decoding!r}: this server has {', '.join(map(repr, known))} "
                "(ServeConfig.decoding)"
            )
        return Kind(
            k=next(one for one in self.ks if one >= k),
            reads=reads,
            explains=explains,
            chooses=bool(asked.choices),
            edits=bool(asked.replace),
            decoding="" if asked.choices else decoding,
        )

    def k_of(self, asked: Asked) -> int:
        """The number of passages that a question gets."""
        return asked.k or min(self.atlas.told.read.k, self.deepest)

    def answer(
        self,
        kind: Kind,
        asked: Sequence[Asked],
        on_found: OnFound = lambda _: None,
        corpus: Corpus | None = None,
        on_texts: OnTexts | None = None,
    ) -> tuple[list[Answer], int]:
        """Answer questions of one kind, up to the largest of `batch_rows`.

        Args:
          corpus, on_texts: see `Atlas.ask_in`.

        Returns:
          The answers, and the rows of the program that gave them.

        Raises:
          UserError: a question is at fault.
        """
        rows = next(one for one in self.batch_rows if one >= len(asked))
        limited = [dataclasses.replace(one, k=self.k_of(one)) for one in asked]
        return self.atlas.ask_in(
            self._shapes[kind, rows], limited, on_found, corpus, on_texts
        ), rows

    def best_batch(self, kind: Kind, waiting: int) -> int:
        """How many of the questions that wait to answer together.

        As many as give about the least time for a question, by the time that each shape took when
        it was warm. A shape takes its time whether it is full or not. So of five questions four
        are answered first where sixteen rows take four times as long as four, and all five where
        they take as long.
        """
        each = {rows: self._seconds[kind, rows] / min(rows, waiting) for rows in self.batch_rows}
        good = 1.1 * min(each.values())  # a measured time varies by some percent
        return min(waiting, max(rows for rows in each if each[rows] <= good))

    def compile(self) -> Iterator[tuple[int, int]]:
        """Compile every shape and time it; yields how many are done, and all.

        The first run of a shape compiles its program; the faster of two more is its time.
        """
        for number, ((kind, rows), shape) in enumerate(self._shapes.items(), start=1):
            asked = Asked(
                "Is everything warm?",
                k=kind.k,
                replace={self._some_id(): "Everything is warm."} if kind.edits else {},
                choices=("yes", "no") if kind.chooses else (),
            )
            self.atlas.ask_in(shape, [asked] * rows)
            self._seconds[kind, rows] = min(self._time(shape, [asked] * rows) for _ in range(2))
            yield number, len(self._shapes)

    def _time(self, shape: Shape, asked: Sequence[Asked]) -> float:
        start = time.monotonic()
        self.atlas.ask_in(shape, asked)
        return time.monotonic() - start

    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part."""
        params = self.atlas.made.params
        return {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}

    def _some_id(self) -> str:
        assert self.atlas.store is not None
        return str(self.atlas.store.passage(0)["id"])

    def _kinds(self) -> Iterator[Kind]:
        config, searches = self._config, self.atlas.store is not None
        decodings: list[Decoding] = ["", *config.decoding]
        edits = (False, True) if searches and config.max_replaced else (False,)
        for k, edit in itertools.product(self.ks, edits):
            if searches:
                yield Kind(k, reads=False, edits=edit)
            for explains in (False, True) if searches and config.explain else (False,):
                for decoding in decodings:
                    yield Kind(k, explains=explains, edits=edit, decoding=decoding)
                if self.takes_choices:
                    yield Kind(k, explains=explains, edits=edit, chooses=True)

    def _shape(self, kind: Kind, rows: int) -> Shape:
        config = self._config
        edited = config.max_replaced if kind.edits else 0
        return Shape(
            rows=rows,
            k=kind.k,
            explains=kind.explains,
            excluded=max(1, config.max_excluded + edited),
            choices=config.max_choices if kind.chooses else self._own_choices if kind.reads else 0,
            edited=edited,
            searched=self.deepest,
            limits=True,
            reads=kind.reads,
            decoding=kind.decoding,
        )


_LIMITED = {"exclude": "excluded", "replace": "replaced", "choices": "choices"}
