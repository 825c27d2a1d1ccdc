"""The demo's stages: numbered headings, the command behind each, and the time it took."""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from atlas_jax.core.errors import UserError

Main = Callable[[Sequence[str]], int]


class Stages:
    """Prints and times the stages of one run.

    Attributes:
      seconds: duration of every stage that has ended, by name.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        """Fix the stages and their order."""
        self._console, self._names = console, list(names)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage: its heading now, its duration at the end."""
        number, total = self._names.index(name) + 1, len(self._names)
        self._console.print()
        self._console.rule(f"[bold]{number}/{total}  {name}", align="left", characters="─")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)
        self._console.print(f"[dim]{self.seconds[name]:.0f} s[/dim]")

    def say(self, line: str) -> None:
        """Print a line under the present heading."""
        self._console.print(line, highlight=False, markup=False)

    def run(self, name: str, main: Main, arguments: Sequence[str]) -> None:
        """Run an entry point as the command line would, showing that command.

        Raises:
          UserError: it ended with an exit code other than 0; it has said why.
        """
        lines = [f"$ atlas-jax {name}", *(f"    {shlex.quote(a)}" for a in arguments)]
        self._console.print(Text(" \\\n".join(lines), style="dim"), soft_wrap=True)
        code = main(list(arguments))
        if code:
            raise UserError(f"`atlas-jax {name}` ended with exit code {code}")
