"""Room for more passages, made in the background before the rows on the devices are full."""

import sys
import threading
from collections.abc import Callable, Mapping

import jax

from atlas_jax.answering.programs import Programs
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.turns import Turns
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.models.assembly import Assembled


class Growth:
    """Enlarges the index of a corpus once little room is left.

    Its thread compiles all programs that were used so far for the larger number of rows. Only then
    are the rows copied. So no question and no change waits for the compiler, but for the copy
    alone. The threads of several processes do not end together: there the next change copies, once
    all have ended.
    """

    def __init__(
        self,
        corpus: Corpus,
        programs: Programs,
        variants: Mapping[str, Assembled],
        changing: threading.Lock,
        turns: Turns,
    ) -> None:
        """Do nothing yet.

        Args:
          programs: those that search the corpus.
          variants: the models that they were made for.
          changing: held by who changes the corpus.
          turns: those of who searches it.
        """
        self._corpus, self._programs, self._variants = corpus, programs, variants
        self._changing, self._turns = changing, turns
        self._thread: threading.Thread | None = None
        self._ready = 0  # rows that all is compiled for, where the next change is to copy

    def begin(self) -> None:
        """Make room if little is left; returns at once. Called by who changes the corpus."""
        corpus = self._corpus
        if not corpus.is_nearly_full or self._ready > corpus.capacity:
            return
        if self._thread and self._thread.is_alive():
            return
        rows = corpus.wider()
        if multihost.is_first():
            print(
                f"{corpus.store.directory}: {corpus.store.count:,} of {corpus.capacity:,} rows on "
                f"the devices are in use; room for {rows:,} is made in the background",
                file=sys.stderr,
            )
        self._thread = threading.Thread(
            target=self._make, args=(rows, *corpus.planned(rows)), daemon=True
        )
        self._thread.start()

    def copy(self, meeting: Meeting) -> None:
        """Copy the rows if the threads of all processes have ended; called by who changes the
        corpus in several processes, while nobody searches.
        """
        ready = int(min(meeting.together("room", lambda: f"{self._ready:015d}")))
        if ready and ready > self._corpus.capacity:
            self._corpus.grow(ready)

    def wait(self) -> None:
        """Return when no room is being made."""
        if self._thread is not None:
            self._thread.join()

    def _make(self, rows: int, planned: Corpus, compile_all: Callable[[], None]) -> None:
        corpus, made = self._corpus, self._variants[""]
        try:
            with partitioning.activate(made.mesh, made.rules):
                compile_all()
                self._programs.compile_over(planned, list(self._variants.values()))
                if jax.process_count() > 1:
                    self._ready = rows
                    return
                with self._changing, self._turns.writing():
                    if corpus.capacity < rows:
                        corpus.grow(rows)
        except Exception as error:  # what is full later grows when a change needs it
            print(f"{corpus.store.directory}: no room could be made: {error}", file=sys.stderr)
