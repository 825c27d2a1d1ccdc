"""Where the processes of a run wait for each other: through JAX's coordination service.

No device takes part. So a wait may last as long as it must, and names who is missing.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from jax._src import distributed  # JAX has no other way to the coordination service

from atlas_jax.core.errors import Interrupted, UserError, one_line
from atlas_jax.core.multihost import joined

Made = TypeVar("Made")

TELL = 30.0  # seconds until it is told who is missing
GIVE_UP = 900.0  # seconds without a sign of life of those who are missing
_LOOK = 0.5  # seconds at most, between two looks
_NUMBERS = itertools.count()


class Meeting:
    """The processes of this run, which all must hold the same meetings in the same order.

    Attributes:
      index, count: of this process, and their number.
    """

    def __init__(self, what: str) -> None:
        """Begin without waiting; ``what`` the processes do together, for messages."""
        self.index, self.count = joined()
        self._what, self._name = what, f"atlas/{next(_NUMBERS)}"

    @property
    def is_first(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def together(self, step: str, work: Callable[[], str | None]) -> list[str]:
        """Do this process's share of a step, and wait until all others have done theirs.

        Returns:
          What the work of each process returned; '' for None.

        Raises:
          UserError: the work of a process raised one.
          Interrupted: a process is missing, or met an error that is not of the user's making.
          OSError: the work of this process raised it.
        """
        try:
            mine = {"told": work() or ""}
        except Exception as error:
            if self.count > 1:
                is_fault = isinstance(error, UserError | OSError)
                kept = isinstance(error, Interrupted) or not is_fault
                text = one_line(error) if is_fault else f"{type(error).__name__}: {one_line(error)}"
                with contextlib.suppress(UserError):  # that another one is missing matters less
                    self._set(f"{step}/{self.index}", json.dumps({"error": text, "kept": kept}))
                    self._wait(step)
            raise
        if self.count == 1:
            return [mine["told"]]
        self._set(f"{step}/{self.index}", json.dumps(mine))
        found = self._wait(step)
        self._raise_of(found)
        return [found[one]["told"] for one in range(self.count)]

    def own(self, step: str, work: Callable[[], Made]) -> Made:
        """As `together`, where no other process needs to know what the work returned.

        Returns:
          What it returned here.
        """
        made = list[Made]()
        self.together(step, lambda: made.append(work()))
        return made[0]

    def sign(self, step: str, text: str) -> None:
        """Give a sign of life, and look whether the others still work at this step.

        Raises:
          UserError: the work of another process failed.
        """
        if self.count > 1:
            self._set(f"signs/{self.index}", text)
            self._raise_of(self._found(step))

    def forget(self, step: str) -> None:
        """Take back what this process told at a step, which all have left behind."""
        if self.count > 1:
            key = f"{self._name}/{step}/{self.index}"
            self._asked(lambda client: client.key_value_delete(key))

    def _raise_of(self, found: dict[int, Any]) -> None:
        for number, one in sorted(found.items()):
            if "error" in one:
                kind = Interrupted if one["kept"] else UserError
                raise kind(f"process {number} of {self.count}: {one['error']}")

    def _wait(self, step: str) -> dict[int, Any]:
        """What every process told at this step, when all have."""
        begun = told = alive = time.monotonic()
        signs: Any = None
        pause = 0.005
        while len(found := self._found(step)) < self.count:
            now = time.monotonic()
            missing = [one for one in range(self.count) if one not in found]
            seen = {n: text for n, text in self._pairs("signs") if n in missing}
            if seen != signs:
                signs, alive = seen, now
            if now - alive > GIVE_UP:
                raise Interrupted(
                    f"{self._what}: nothing was heard of {self._named(missing, seen)} for "
                    f"{GIVE_UP:.0f} s; start the command again on all hosts, which keeps what is "
                    "done"
                )
            if now - told > TELL:
                told = now
                print(
                    f"{self._what}: waiting for {self._named(missing, seen)} for "
                    f"{now - begun:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(pause)
            pause = min(2 * pause, _LOOK)
        return found

    def _named(self, missing: list[int], signs: dict[int, str]) -> str:
        names = [f"{one} ({signs[one]})" if one in signs else str(one) for one in missing]
        return f"process {', '.join(names)} of {self.count}"

    def _found(self, step: str) -> dict[int, Any]:
        return {number: json.loads(text) for number, text in self._pairs(step)}

    def _pairs(self, folder: str) -> list[tuple[int, str]]:
        pairs = self._asked(lambda client: client.key_value_dir_get(f"{self._name}/{folder}/"))
        return [(int(key.rpartition("/")[2]), value) for key, value in pairs]

    def _set(self, key: str, value: str) -> None:
        self._asked(
            lambda client: client.key_value_set(f"{self._name}/{key}", value, allow_overwrite=True)
        )

    def _asked(self, ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(distributed.global_state.client)
        except RuntimeError as error:
            raise Interrupted(
                f"{self._what}: process 0 of {self.count}, where the processes meet, does not "
                f"answer ({one_line(error)}); start the command again on all hosts"
            ) from error
