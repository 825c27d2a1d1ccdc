"""Questions that wait to be answered, joined into batches."""

import collections
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from atlas_jax.answering.asked import Asked


class QueueFull(Exception):
    """No room for these questions now; `retry_after` are seconds after which there may be."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} questions are waiting; ask again in {retry_after} s")
        self.retry_after = retry_after


class DeadlinePassed(Exception):
    """The question was not answered in time."""


class Closed(Exception):
    """The server takes no more questions."""


@dataclass(eq=False)
class Ticket:
    """One question in the queue.

    Attributes:
      asked: the question.
      kind, version: questions that have both in common may be answered together; the version
        is of the passages, None = the newest.
      deadline: `time.monotonic` after which nobody waits for the answer.
      corpus: the passages as of this version.
      on_found: called with the passages, in the thread that answers.
      on_text: called with the answer so far, in the same thread; None = nobody wants to know.
      answered: gets the result or the error.
      arrived: `time.monotonic` of its arrival.
    """

    asked: Asked
    kind: Hashable
    deadline: float
    version: int | None = None
    corpus: Any = None
    on_found: Callable[[Any], None] = lambda _: None
    on_text: Callable[[str], None] | None = None
    answered: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Queue:
    """A bounded queue of tickets; any thread may call any method."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 0.1  # for each question, a running mean

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, tickets: Sequence[Ticket]) -> None:
        """Take all of these tickets, or none.

        Raises:
          QueueFull: there is no room for all of them.
          Closed: see `close`.
        """
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            waiting = len(self._waiting)
            if waiting + len(tickets) > self._capacity:
                raise QueueFull(waiting, max(1, round(waiting * self._seconds)))
            self._waiting.extend(tickets)
            self._changed.notify_all()

    def withdraw(self, tickets: Iterable[Ticket]) -> None:
        """Take tickets out whose client has left; those that are being answered go on."""
        gone = set(tickets)
        with self._changed:
            self._waiting = collections.deque(one for one in self._waiting if one not in gone)
        for ticket in gone:
            ticket.answered.cancel()

    def take(self, how_many: Callable[[Any, int], int]) -> list[Ticket]:
        """Wait for questions, then take the oldest and others of its kind.

        Args:
          how_many: kind and the number of questions of this kind that wait -> how many to take.

        Returns:
          The tickets; none once the queue is closed and empty.
        """
        with self._changed:
            while True:
                self._drop_late()
                if self._waiting:
                    break
                if self._closed:
                    return []
                self._changed.wait()
            first = self._waiting[0]
            kind = first.kind
            alike = [
                one for one in self._waiting if (one.kind, one.version) == (kind, first.version)
            ]
            taken = alike[: how_many(kind, len(alike))]
            chosen = set(taken)
            self._waiting = collections.deque(one for one in self._waiting if one not in chosen)
            return taken

    def answered(self, questions: int, seconds: float) -> None:
        """Note how long a batch took, for later advice when to ask again."""
        self._seconds += 0.2 * (seconds / max(1, questions) - self._seconds)

    def close(self) -> None:
        """Take no more tickets; those that wait are still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _drop_late(self) -> None:
        now, kept = time.monotonic(), collections.deque[Ticket]()
        for ticket in self._waiting:
            if ticket.deadline > now:
                kept.append(ticket)
            elif ticket.answered.set_running_or_notify_cancel():
                ticket.answered.set_exception(DeadlinePassed("the question waited too long"))
        self._waiting = kept
