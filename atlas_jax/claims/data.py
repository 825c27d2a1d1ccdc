"""The files that the rows read: prepared, sampled and drawn, each once."""

import collections
from collections.abc import Callable
from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import JsonObject, plain_or_gz, read_jsonl, write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.demo.factbook_splits import draw_few_shot, stable_random
from atlas_jax.demo.factbook_variants import cut_again, found_again, reworded


class Data:
    """Where the files are.

    Attributes:
      given: the folder of --data, described in docs/reports/claims.md; None if not given.
      questions: number of rows of an evaluation file that are asked.
    """

    def __init__(self, folder: Path, given: Path | None, questions: int) -> None:
        """Files are made in `folder` when they are first needed."""
        self.given, self.questions, self._folder = given, questions, folder
        self._made: set[Path] = set()

    def has(self, name: str) -> bool:
        """Whether `name` is available: '' is in the package, other names are folders of --data."""
        return not name or (self.given is not None and (self.given / name).is_dir())

    def of(self, name: str) -> Path:
        """A file of --data, `name` below it; gzip'd or not.

        Raises:
          UserError: the file does not exist.
        """
        if self.given is None:
            raise UserError(f"{name} is a file of --data, which is not given")
        if path := plain_or_gz(self.given / name):
            return path
        raise UserError(f"--data {self.given}: there is neither {name} nor {name}.gz")

    def factbook(self, name: str) -> Path:
        """A file of the Factbook as the demo prepares it; each process makes it anew."""
        folder = self._folder / "factbook"
        if folder not in self._made:
            factbook.prepare(folder)
            self._made.add(folder)
        return folder / name

    def sample(self, path: Path, **fields: object) -> Path:
        """This many rows of an evaluation file, drawn at random but always the same.

        Args:
          fields: only rows with these values are drawn.
        """

        def draw() -> list[JsonObject]:
            rows = [r for r in _read(path) if all(r.get(n) == v for n, v in fields.items())]
            count = min(self.questions, len(rows))
            places = stable_random("claims", _name(path)).sample(range(len(rows)), count)
            return [rows[place] for place in sorted(places)]

        return self._write(f"{_name(path)}_{self.questions}", draw)

    def few_shot(self, path: Path, seed: int) -> Path:
        """64 questions that cover every relation, as the demo draws them."""
        count = factbook.FEW_SHOT
        return self._write(
            f"{_name(path)}_{count}shot_seed{seed}",
            lambda: draw_few_shot(_read(path), count, seed),
        )

    def of_edition(self, path: Path, edition: str) -> Path:
        """Rows of `temporal` as questions with the answers and passages of one edition."""

        def draw() -> list[JsonObject]:
            own = {"answers": f"answers_{edition}", "gold": f"gold_{edition}"}
            return [
                {"question": row["question"], **{ours: row[theirs] for ours, theirs in own.items()}}
                for row in _read(path)
            ]

        return self._write(f"{_name(path)}_of_{edition}", draw)

    def about(self, passages: Path, questions: Path) -> Path:
        """The passages with a title that one of the questions is about."""

        def draw() -> list[JsonObject]:
            titles = {row["title"] for row in _read(questions)}
            return [row for row in _read(passages) if row["title"] in titles]

        return self._write(f"{_name(passages)}_about_{_name(questions)}", draw)

    def labelled(self, path: Path, count: int, seed: int) -> Path:
        """This many rows, each `label` equally often; a longer draw begins with a shorter one.

        Raises:
          UserError: a label has too few rows.
        """

        def draw() -> list[JsonObject]:
            by_label: dict[str, list[JsonObject]] = collections.defaultdict(list)
            for row in _read(path):
                by_label[row["label"]].append(row)
            for label, rows in by_label.items():
                stable_random("claims", seed, label).shuffle(rows)
            labels = sorted(by_label)
            turns = [labels[n % len(labels)] for n in range(count)]
            if any(len(by_label[label]) < turns.count(label) for label in labels):
                raise UserError(f"{path}: too few rows of a label to draw {count}")
            return [by_label[label][n // len(labels)] for n, label in enumerate(turns)]

        return self._write(f"{_name(path)}_{count}shot_seed{seed}", draw)

    def findable(self, path: Path, seed: int) -> Path:
        """64 questions for which word matching finds the gold passage among the first five.

        Other questions may make no sense without their passage.
        """
        count = factbook.FEW_SHOT

        def draw() -> list[JsonObject]:
            rows = [row for row in _read(path) if 0 < (row.get("bm25_rank") or 0) <= 5]
            if len(rows) < count:
                raise UserError(f"{path}: {len(rows)} questions have a bm25_rank of 5 or less")
            return stable_random("claims", seed).sample(rows, count)

        return self._write(f"{_name(path)}_{count}shot_seed{seed}", draw)

    def reworded(self, path: Path) -> Path:
        """Questions about the Factbook in words that no question file has."""
        return self._write(f"{_name(path)}_reworded", lambda: list(map(reworded, _read(path))))

    def cut_again(self, passages: Path, questions: Path) -> tuple[Path, Path]:
        """The Factbook's passages cut another way, and the questions that they still answer."""
        cut = self._write(f"{_name(passages)}_cut_again", lambda: cut_again(_read(passages)))
        asked = self._write(
            f"{_name(questions)}_cut_again", lambda: found_again(_read(questions), _read(cut))
        )
        return cut, asked

    def _write(self, name: str, draw: Callable[[], list[JsonObject]]) -> Path:
        """Draw and write a file, once in a process."""
        path = self._folder / f"{name}.jsonl"
        if path not in self._made:
            write_jsonl(path, draw())
            self._made.add(path)
        return path


def _read(path: Path) -> list[JsonObject]:
    return [record for _, record in read_jsonl(path)]


def _name(path: Path) -> str:
    """Of a file with its folder, without endings."""
    return f"{path.parent.name}_{path.name.removesuffix('.gz').removesuffix('.jsonl')}"
