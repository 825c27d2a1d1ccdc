"""Changes of the passages of a loaded Atlas, while it answers."""

import contextlib
import functools
import threading
from collections.abc import Mapping

from atlas_jax.answering.growth import Growth
from atlas_jax.answering.programs import Programs
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core import partitioning
from atlas_jax.core.meeting import Meeting
from atlas_jax.core.turns import Turns
from atlas_jax.corpus.change import SegmentEmbedder
from atlas_jax.corpus.corpus import Corpus
from atlas_jax.index.changes import Batch
from atlas_jax.index.living import LivingStore
from atlas_jax.models.assembly import Assembled


class HotChanges:
    """Changes a corpus on the disk and where it is searched, one batch after the other.

    A process of its own embeds while questions are answered, and only the swap waits for its turn.
    The devices of several processes have to compute the same, one by one. So there a whole change
    is a turn, which comes after the same questions in all of them. The change is made in all or in
    none.
    """

    def __init__(
        self,
        told: AnswerRun,
        corpus: Corpus,
        programs: Programs,
        variants: Mapping[str, Assembled],
        turns: Turns,
    ) -> None:
        """Compile nothing yet.

        Args:
          programs: those that search the corpus.
          variants: the models that they were made for; "" = as loaded.
          turns: those of who searches it.
        """
        self._corpus, self._turns, self._made = corpus, turns, variants[""]
        self._changing = threading.Lock()
        self.growth = Growth(corpus, programs, variants, self._changing, turns)
        made = self._made
        self._segments = SegmentEmbedder(
            made.models.retriever,
            made.params["retriever"],
            made.tokenizers,
            told.corpus.config,
            made.mesh,
            made.rules,
            corpus.states,
        )

    def change(self, batch: Batch) -> int:
        """Make a version and search it; returns its number. See `Atlas.change_passages`."""
        corpus = self._corpus
        assert isinstance(corpus.store, LivingStore)
        with self._changing:
            meeting = Meeting(f"passages of {corpus.store.directory}")
            several = meeting.count > 1
            with (
                partitioning.activate(self._made.mesh, self._made.rules),
                contextlib.ExitStack() as turn,
            ):
                if several:
                    turn.enter_context(self._turns.writing(functools.partial(_most, meeting)))
                    self.growth.copy(meeting)
                now = corpus.store.version["version"]
                store, fresh = self._segments.change(batch, in_memory=True, after=now)
                swap = meeting.own("ready", lambda: corpus.swap(store, fresh))
                if not several:
                    turn.enter_context(self._turns.writing())
                swap()
            self.growth.begin()
            return store.version["version"]


def _most(meeting: Meeting, number: int) -> int:
    """The greatest number that a process has."""
    return max(map(int, meeting.together("turn", lambda: str(number))))
