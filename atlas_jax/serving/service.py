"""Loads the models, compiles, and answers what waits, in a thread of its own."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from atlas_jax.answering.asked import Asked, examples_of
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.results import Answer, Passage
from atlas_jax.core.errors import UserError
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.index.living import LivingStore
from atlas_jax.index.versions import find_version
from atlas_jax.serving.config import ServeConfig
from atlas_jax.serving.editions import Editions
from atlas_jax.serving.engine import Engine, Kind
from atlas_jax.serving.logs import event
from atlas_jax.serving.metrics import Metrics
from atlas_jax.serving.problems import Refused
from atlas_jax.serving.queue import Queue, QueueFull, Ticket
from atlas_jax.serving.schemas import Decoding, IndexReply, Timings


@dataclasses.dataclass(frozen=True)
class Done:
    """An answer with its timings."""

    answer: Answer
    timings: Timings
    index: IndexReply | None = None


class Service:
    """What answers questions: a queue, an engine, and the thread between them.

    Attributes:
      config: the settings.
      queue: questions that wait.
      metrics: what is counted.
      failure: why the models could not be loaded; None if they could.
    """

    def __init__(
        self, config: ServeConfig, load: Callable[[], Atlas], on_failure: Callable[[], None]
    ) -> None:
        """Prepare; `start` loads.

        Args:
          load: loads the models.
          on_failure: called in the service's thread if they cannot be loaded.
        """
        self.config, self._load, self._on_failure = config, load, on_failure
        self.queue = Queue(config.queue)
        self.metrics = Metrics(lambda: len(self.queue), lambda: float(self.is_ready))
        self.failure: BaseException | None = None
        self._engine: Engine | None = None
        self._state = "loading the models"
        self._ready = threading.Event()
        self._changes = threading.Lock()
        self._editions = Editions(
            config.earlier, lambda as_of: self.engine.atlas.earlier(as_of), config.deadline_seconds
        )
        self._thread = threading.Thread(target=self._run, name="atlas-jax-answers", daemon=True)

    def start(self) -> None:
        """Begin to load, in another thread."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, then end; a program that is being compiled is not waited for."""
        seconds = self.config.drain_seconds if self.is_ready else 1
        self._ready.clear()
        self._state = "shutting down"
        self.queue.close()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def is_running(self) -> bool:
        """Whether its thread still works."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether every program is compiled."""
        return self._ready.is_set()

    @property
    def state(self) -> str:
        """What the server is doing, in words."""
        return "ready" if self.is_ready else self._state

    @property
    def engine(self) -> Engine:
        """The engine of a server that is ready.

        Raises:
          Refused: it is not.
        """
        if self._engine is None or not self.is_ready:
            raise Refused(503, f"not ready: {self.state}", {"retry-after": "2"})
        return self._engine

    @property
    def serves_earlier(self) -> bool:
        """Whether a question may be asked as of an earlier version."""
        return self.config.earlier > 0 and self.engine.atlas.keeps_earlier

    def index(self) -> IndexReply | None:
        """The index that serves; None for a closed book."""
        if self._engine is None or self._engine.atlas.store is None:
            return None
        return _index_of(self._engine.atlas)

    def change(
        self, passages: Sequence[Mapping[str, str]], delete: Sequence[str]
    ) -> tuple[dict[str, int], IndexReply]:
        """Add or replace passages, and delete others, as one version.

        Returns:
          How many were added, replaced and deleted, and the index that now serves.

        Raises:
          UserError: an id or a passage is at fault; nothing is changed then.
          Refused: the server is not ready, or changes that came earlier take too long.
        """
        atlas, seconds = self.engine.atlas, self.config.deadline_seconds
        if not self._changes.acquire(timeout=seconds):
            raise Refused(503, "earlier changes are still being made", {"retry-after": "5"})
        try:
            store = atlas.store
            assert store is not None
            # Nobody else changes it: only this method does, and another process is refused.
            known = [store.find(one["id"]) is not None for one in passages]
            replace = [one for one, is_known in zip(passages, known, strict=True) if is_known]
            add = [one for one, is_known in zip(passages, known, strict=True) if not is_known]
            version = atlas.change_passages(add=add, replace=replace, delete=delete)
            changed = {"added": len(add), "replaced": len(replace), "deleted": len(delete)}
            event("changed", version=version, **changed)
            return changed, _index_of(atlas)
        finally:
            self._changes.release()

    def submit(
        self,
        asked: Sequence[Asked],
        reads: bool,
        explains: bool,
        decoding: Decoding,
        as_of: str = "",
        on_found: Callable[[int, tuple[Passage, ...]], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Ticket]:
        """Put questions into the queue.

        Args:
          as_of: version of the passages, or a time; "" = the newest.
          on_found: called with a question's number and its passages, in the service's thread.
          on_text: called there with a question's number and its answer so far.

        Raises:
          UserError: a question is at fault, or there is no such version.
          QueueFull: there is no room for all of them.
          Refused: the server is not ready.
        """
        engine, deadline = self.engine, time.monotonic() + self.config.deadline_seconds
        kinds = [engine.kind(one, reads, explains, decoding) for one in asked]
        version, corpus = self._earlier(engine, as_of, len(asked))
        tickets = [
            Ticket(one, kind, deadline, version, corpus)
            for one, kind in zip(asked, kinds, strict=True)
        ]
        if version is not None:
            give_back = functools.partial(self._editions.give_back, version)
            for ticket in tickets:
                ticket.answered.add_done_callback(lambda _: give_back())
        for number, ticket in enumerate(tickets):
            if on_found is not None:
                ticket.on_found = functools.partial(on_found, number)
            if on_text is not None:
                ticket.on_text = functools.partial(on_text, number)
        try:
            with engine.atlas.reading():
                store = corpus.store if corpus else engine.atlas.store
                examples_of(engine.atlas.told, asked, store)  # refuses what is at fault
            self.queue.offer(tickets)
        except BaseException as error:
            if isinstance(error, QueueFull):
                self.metrics.shed.inc(len(tickets))
            self.queue.withdraw(tickets)
            raise
        return tickets

    def _earlier(
        self, engine: Engine, as_of: str, questions: int
    ) -> tuple[int | None, Corpus | None]:
        """The version that `as_of` means, and its passages; Nones for the newest."""
        if not as_of:
            return None, None
        if not self.config.earlier:
            raise UserError(
                "as_of: this server answers from the newest version alone (ServeConfig.earlier)"
            )
        store = engine.atlas.store
        if store is None:
            raise UserError("as_of: a closed book has no versions")
        found = find_version(store.directory, as_of)
        version = found["version"] if found else 0
        return version, self._editions.take(version, questions)

    def _run(self) -> None:
        try:
            engine, start = Engine(self._load(), self.config), time.monotonic()
            for done, programs in engine.compile():
                self._state = f"{done} of {programs} programs are compiled"
                if self._closing:
                    return
        except BaseException as error:
            self.failure = error
            self._on_failure()
            return
        self._engine = engine
        self._ready.set()
        seconds = round(time.monotonic() - start, 1)
        event("ready", seconds=seconds, programs=programs, ks=engine.ks, rows=engine.batch_rows)
        while tickets := self.queue.take(engine.best_batch):
            taken = [one for one in tickets if one.answered.set_running_or_notify_cancel()]
            if taken:
                self._answer(engine, taken)

    @property
    def _closing(self) -> bool:
        return self._state == "shutting down"

    def _answer(self, engine: Engine, tickets: Sequence[Ticket]) -> None:
        start = time.monotonic()
        try:
            results = self._batch(engine, tickets, start)
        except UserError as error:
            if len(tickets) > 1:  # one of them is at fault: the others shall not suffer from it
                for ticket in tickets:
                    self._answer(engine, [ticket])
                return
            tickets[0].answered.set_exception(error)
            return
        except BaseException as error:
            for ticket in tickets:
                ticket.answered.set_exception(error)
            return
        for ticket, result in zip(tickets, results, strict=True):
            ticket.answered.set_result(result)
        self.queue.answered(len(tickets), time.monotonic() - start)

    def _batch(self, engine: Engine, tickets: Sequence[Ticket], start: float) -> list[Done]:
        kind, corpus, found_at = tickets[0].kind, tickets[0].corpus, [start]
        searched: list[IndexReply | None] = [None]
        assert isinstance(kind, Kind)

        def on_found(passages: list[tuple[Passage, ...]]) -> None:
            found_at[0] = time.monotonic()
            # Called while the batch is answered, when nothing can change.
            searched[0] = _index_of(engine.atlas, corpus) if engine.atlas.store else None
            for ticket, found in zip(tickets, passages, strict=True):
                ticket.on_found(found)

        def on_texts(texts: list[str]) -> None:
            for ticket, text in zip(tickets, texts, strict=True):
                if ticket.on_text is not None:
                    ticket.on_text(text)

        streams = on_texts if any(one.on_text for one in tickets) else None
        asked = [one.asked for one in tickets]
        answers, rows = engine.answer(kind, asked, on_found, corpus, streams)
        end = time.monotonic()
        self.metrics.questions.inc(len(tickets))
        self.metrics.batch.observe(len(tickets))
        self.metrics.stage.labels("find").observe(found_at[0] - start)
        if kind.reads:
            self.metrics.stage.labels("read").observe(end - found_at[0])

        def milliseconds(seconds: float) -> float:
            return round(1000 * seconds, 2)

        return [
            Done(
                answer,
                Timings(
                    waited=milliseconds(start - ticket.arrived),
                    found=milliseconds(found_at[0] - start),
                    read=milliseconds(end - found_at[0]) if kind.reads else 0.0,
                    batch=len(tickets),
                    rows=rows,
                ),
                searched[0],
            )
            for ticket, answer in zip(tickets, answers, strict=True)
        ]


def _index_of(atlas: Atlas, corpus: Corpus | None = None) -> IndexReply:
    store = corpus.store if corpus else atlas.store
    assert isinstance(store, LivingStore)
    return IndexReply(
        version=atlas.index_version,
        passages=store.count,
        hash=store.content_hash[:12],
        passages_version=store.version["version"],
    )
