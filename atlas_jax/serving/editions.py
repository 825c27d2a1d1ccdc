"""Earlier versions of the passages, loaded when they are asked for; a bounded number of them."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future

from atlas_jax.corpus.corpus import Corpus
from atlas_jax.serving.problems import Refused

_BUSY = "all places for earlier versions are in use (ServeConfig.earlier); ask again"


class _Place:
    """One version in memory, and the number of questions that need it there."""

    def __init__(self) -> None:
        self.corpus: Future[Corpus] = Future()
        self.users = 0


class Editions:
    """Keeps the versions that were asked for last; any thread may call any method.

    A version is loaded in the thread that asks for it, so questions about the newest one need not
    wait. One that a question still needs is never given up.
    """

    def __init__(self, most: int, load: Callable[[str], Corpus], seconds: float) -> None:
        """Load nothing yet.

        Args:
          most: versions that lie in memory at a time, those that are being loaded among them.
          load: loads a version by its number.
          seconds: how long to wait for a version that another thread loads.
        """
        self._most, self._load, self._seconds = most, load, seconds
        self._places: collections.OrderedDict[int, _Place] = collections.OrderedDict()
        self._lock = threading.Lock()

    def take(self, version: int, users: int) -> Corpus:
        """The passages as of a version, for so many questions; each gives it back once.

        Raises:
          UserError: it cannot be loaded.
          Refused: as many others as there may be are in use.
        """
        place, is_new = self._reserve(version, users)
        try:
            if is_new:
                place.corpus.set_result(self._load(str(version)))
            return place.corpus.result(self._seconds)
        except TimeoutError:
            self.give_back(version, users)
            raise Refused(503, f"version {version} is being loaded", {"retry-after": "5"}) from None
        except BaseException as error:
            if is_new:
                with self._lock:
                    self._places.pop(version)
                place.corpus.set_exception(error)
            raise

    def give_back(self, version: int, users: int = 1) -> None:
        """So many questions need it no longer; it stays until its place is needed."""
        with self._lock:
            if version in self._places:
                self._places[version].users -= users

    def _reserve(self, version: int, users: int) -> tuple[_Place, bool]:
        with self._lock:
            place = self._places.get(version)
            is_new = place is None
            if place is None:
                idle = [number for number, one in self._places.items() if not one.users]
                if len(self._places) >= self._most:
                    if not idle:
                        raise Refused(503, _BUSY, {"retry-after": "2"})
                    del self._places[idle[0]]
                place = self._places[version] = _Place()
            self._places.move_to_end(version)
            place.users += users
            return place, is_new
