"""Many readers at a time, or one writer: for what threads share and one of them changes."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Turns:
    """Lets readers in together, and a writer alone; readers that come later wait for a writer.

    Where several processes do the same, a writer comes after the same readers in all of them.
    """

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._readers, self._writers, self._writing = 0, 0, False
        self._begun, self._first = 0, 0  # readers so far, and those that come before a writer

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Nobody writes while the block runs. A thread may not nest such blocks."""
        with self._state:
            self._state.wait_for(lambda: not self._writers or self._begun < self._first)
            self._readers += 1
            self._begun += 1
            self._state.notify_all()
        try:
            yield
        finally:
            with self._state:
                self._readers -= 1
                self._state.notify_all()

    @contextlib.contextmanager
    def writing(self, agree: Callable[[int], int] = lambda begun: begun) -> Iterator[None]:
        """Nobody else reads or writes while the block runs.

        Args:
          agree: given how many readers have begun here, tells how many have to come first: with
            several processes the most that have begun in one of them.
        """
        with self._state:
            self._writers += 1
            begun = self._begun
        try:
            first = agree(begun)
            with self._state:
                self._first = first
                self._state.notify_all()
                self._state.wait_for(
                    lambda: not self._readers and self._begun >= first and not self._writing
                )
                self._writing = True
            try:
                yield
            finally:
                self._writing = False
        finally:
            with self._state:
                self._writers -= 1
                self._state.notify_all()
