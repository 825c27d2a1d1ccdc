"""The scores measured so far, by row and seed; claims.json keeps them between calls."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from atlas_jax import __version__
from atlas_jax.claims.rows import Group, Row
from atlas_jax.claims.verdict import Summary, summarise
from atlas_jax.core import strict_json
from atlas_jax.core.jsonl import atomic_text

PACKAGES = ("jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row with one seed: the key of the step that gave it, and its scores from 0 to 1."""

    run: str
    scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the table and the figure show.

    Attributes:
      checkpoint: hash of the model folder that every row began with.
      questions: most questions of an evaluation file.
      measured: 'group/row' -> seed -> its scores.
      versions: of the libraries that computed them.
    """

    checkpoint: str
    questions: int
    measured: Mapping[str, Mapping[int, Measured]]
    versions: Mapping[str, str]

    def summary(self, group: Group, row: Row, metric: str) -> Summary | None:
        """A row's score in percent over its seeds; None if it has none."""
        name = row.reads.get(metric, metric)
        seeds = self.measured.get(row_name(group, row), {})
        values = [100.0 * one.scores[name] for one in seeds.values() if name in one.scores]
        return summarise(values)


def row_name(group: Group, row: Row) -> str:
    """Name of a row on the command line and in claims.json."""
    return f"{group.name}/{row.name}"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the figures."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"atlas-jax": __version__, **found, "python": platform.python_version()}


def write(path: Path, results: Results) -> None:
    """Write claims.json, atomically."""
    with atomic_text(path) as file:
        json.dump(dataclasses.asdict(results), file, ensure_ascii=False, indent=1, sort_keys=True)
        file.write("\n")


def read(path: Path) -> Results | None:
    """The results of earlier calls; None if there are none."""
    if not path.is_file():
        return None
    stored: Results = strict_json.read(path, Results)
    return stored


def merged(
    earlier: Results | None, present: Results, keys: Mapping[str, Mapping[int, str]]
) -> Results:
    """The present results, and earlier ones that belong to the same runs.

    Args:
      earlier: result of `read`.
      present: results of this call.
      keys: 'group/row' -> seed -> its present key. Rows without their data in this call have
        none; they are kept if checkpoint and number of questions are the same.
    """
    same = (earlier and (earlier.checkpoint, earlier.questions)) == (
        present.checkpoint,
        present.questions,
    )
    if earlier is None or not same:
        return present
    measured: dict[str, dict[int, Measured]] = {}
    for name in _names(earlier, present):
        now = keys.get(name, {})
        kept = {
            seed: one
            for seed, one in earlier.measured.get(name, {}).items()
            if now.get(seed, one.run) == one.run
        }
        seeds = {**kept, **present.measured.get(name, {})}
        measured[name] = dict(sorted(seeds.items()))
    return dataclasses.replace(present, measured=measured)


def _names(*results: Results) -> Sequence[str]:
    return sorted({name for one in results for name in one.measured})
