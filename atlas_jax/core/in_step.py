"""Batches that all processes of a run take in step: a fault that one meets ends all of them.

Else the process would end alone, and the others would wait for it in the next collective.
"""

from collections.abc import Iterator
from typing import Any

from atlas_jax.core.meeting import Meeting


class InStep(Iterator[Any]):
    """This process's share of an endless stream; all must take as many items.

    Before a process gets an item, each has made its own. They tell each other through the
    coordination service while the devices are busy with the steps before.
    """

    def __init__(self, what: str, items: Any) -> None:
        """Begin with these items, a Grain iterator; ``what`` they are, for messages."""
        self._items, self._meeting, self._taken = items, Meeting(what), 0

    def __next__(self) -> Any:
        """The next item.

        Raises:
          UserError: a process met one, with its number if it is another one.
          Interrupted: a process is missing.
        """
        item = self._meeting.own(f"{self._taken}", lambda: next(self._items))
        if self._taken:  # who is here knows that all have left the step before
            self._meeting.forget(f"{self._taken - 1}")
        self._taken += 1
        return item

    def get_state(self) -> Any:
        """The place in the stream."""
        return self._items.get_state()

    def set_state(self, state: Any) -> None:
        """Go on at a place."""
        self._items.set_state(state)
