"""Progress of long work: a bar on a terminal, else a line from time to time."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Protocol

from tqdm import tqdm

_SECONDS = 30.0  # between two lines


class Progress(Protocol):
    """Common interface: iterate over the rows, or use it as a context manager and `update` it."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def update(self, n: int) -> Any:
        """Count this many more as done."""


def show_progress(
    name: str,
    rows: Iterable[Any] | None = None,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> Progress:
    """Show on stderr how much of `total` is done; with `rows`, `total` is their number.

    Args:
      initial: how much was done before.
      shown: False shows nothing.
    """
    if total is None and isinstance(rows, Collection):
        total = len(rows)
    if shown and not sys.stderr.isatty():
        return _Lines(name, rows, total, initial)
    return tqdm(rows, name, total, initial=initial, unit="", unit_scale=True, disable=not shown)


class _Lines:
    """Progress in a log: a line every half minute, and one at the end."""

    def __init__(
        self, name: str, rows: Iterable[Any] | None, total: int | None, initial: int
    ) -> None:
        self._name, self._rows, self._total, self._done = name, rows, total, initial
        self._start = self._told = time.monotonic()
        self._said: int | None = None  # what the last line told
        if initial:
            self._tell()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._said != self._done:  # an error is told by itself
            self._tell()

    def __iter__(self) -> Iterator[Any]:
        assert self._rows is not None
        with self:
            for row in self._rows:
                yield row
                self.update(1)

    def update(self, n: int) -> None:
        self._done += n
        if time.monotonic() - self._told >= _SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told, self._said = time.monotonic(), self._done
        of = f" of {self._total:,}" if self._total is not None else ""
        seconds = self._told - self._start
        print(f"{self._name}: {self._done:,}{of}, {seconds:.0f} s", file=sys.stderr, flush=True)
