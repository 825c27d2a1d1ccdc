"""Many readers at a time, or one writer: for what threads share and one of them changes."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Lets readers in together, and a writer alone; readers that come later wait for a writer."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._readers, self._writers, self._writing = 0, 0, False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Nobody writes while the block runs. A thread may not nest such blocks."""
        with self._state:
            self._state.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._state:
                self._readers -= 1
                self._state.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else reads or writes while the block runs."""
        with self._state:
            self._writers += 1
            self._state.wait_for(lambda: not self._readers and not self._writing)
            self._writing = True
        try:
            yield
        finally:
            with self._state:
                self._writers -= 1
                self._writing = False
                self._state.notify_all()
