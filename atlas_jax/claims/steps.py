"""Steps: single runs of the entry points, each with a key made from all that decides it.

A step's key is the hash of its whole gin configuration. In it, files are represented by their
content and results of other steps by those steps' keys. So equal work has the same key for all rows
that need it, and another checkpoint or data file gives another key.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from atlas_jax.core.config import clear_gin, config_text, load_gin
from atlas_jax.core.paths import file_sha256
from atlas_jax.demo.paths import bind

KEY_LENGTH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One run of an entry point.

    Attributes:
      command: 'train', 'evaluate', 'build_index' or 'remove_leaks'.
      files: gin files, later ones overriding earlier ones.
      bindings: macros and fields by name; text as it is, paths as `Path`, results of steps as
        `Made`.
    """

    command: str
    files: tuple[str, ...]
    bindings: Mapping[str, "Value"]

    def again(self, command: str, bindings: Mapping[str, "Value"]) -> "Step":
        """A run of another entry point with this configuration and some changes."""
        own = {
            name: Made(value.name, self)
            for name, value in self.bindings.items()
            if isinstance(value, Made) and value.step is None
        }
        return Step(command, self.files, {**self.bindings, **own, **bindings})

    def needs(self) -> list["Step"]:
        """The steps whose results this one reads."""
        found = [v.step for v in self.bindings.values() if isinstance(v, Made) and v.step]
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Made:
    """A file or folder in a step's folder; `step` None: in that of the step that binds it."""

    name: str
    step: Step | None = None


Value = str | int | float | bool | tuple[int, ...] | Path | Made


class Keys:
    """Keys of steps, and hashes of the files they read; each is computed once."""

    def __init__(self) -> None:
        self._steps: dict[Step, str] = {}
        self._configured: dict[tuple[object, ...], str] = {}  # equal steps are read once
        self._files: dict[Path, str] = {}

    def of(self, step: Step) -> str:
        """The step's key.

        Raises:
          UserError: the configuration is at fault.
        """
        if step not in self._steps:
            bindings = _bindings(step, self._content)
            same = (step.command, step.files, *bindings)
            if same not in self._configured:
                load_gin(step.files, bindings)
                text = f"{step.command}\n{config_text()}"
                clear_gin()
                found = hashlib.sha256(text.encode()).hexdigest()
                self._configured[same] = found[:KEY_LENGTH]
            self._steps[step] = self._configured[same]
        return self._steps[step]

    def of_path(self, path: Path) -> str:
        """The hash of a file, or of a folder's files with their names."""
        if path not in self._files:
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.is_file())
                lines = [f"{file_sha256(f)} {f.relative_to(path).as_posix()}" for f in files]
                found = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            else:
                found = file_sha256(path)
            self._files[path] = found[:KEY_LENGTH]
        return self._files[path]

    def _content(self, value: Path | Made) -> Path:
        """What stands for a path in the configuration that is hashed."""
        if isinstance(value, Path):
            return Path("content") / self.of_path(value)
        return Path(self.of(value.step) if value.step else "here") / value.name


def arguments(step: Step, folder: Callable[[Step], Path]) -> list[str]:
    """The step as a command's arguments; `folder` says where a step's work lies."""

    def place(value: Path | Made) -> Path:
        return value if isinstance(value, Path) else folder(value.step or step) / value.name

    bindings = _bindings(step, place)
    return [*(f"--gin_file={f}" for f in step.files), *(f"--gin.{b}" for b in bindings)]


def _bindings(step: Step, place: Callable[[Path | Made], Path]) -> list[str]:
    """`NAME=value` of every binding."""
    found = []
    for name, value in step.bindings.items():
        if isinstance(value, Path | Made):
            found.append(bind(name, place(value)).removeprefix("--gin."))
        else:
            found.append(f"{name}={value!r}")
    return found
