"""The split of the Factbook by country, and few-shot draws.

`factbook_splits.json` fixes 238 countries and territories: train, dev, test and reserved. No
question is ever made about a reserved country; oceans, the European Union and uninhabited places
have passages only.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from atlas_jax.core.errors import UserError

Question = dict[str, Any]
SPLITS_FILE = "factbook_splits.json"


@dataclass(frozen=True)
class Splits:
    """Country codes of each part, and the titles that the edition's names do not give."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    reserved: tuple[str, ...]
    titles: Mapping[str, str]


def load_splits() -> Splits:
    """Return the shipped split."""
    text = resources.files("atlas_jax.demo").joinpath(SPLITS_FILE).read_text(encoding="utf-8")
    stored = json.loads(text)
    parts = {name: tuple(stored[name]) for name in ("train", "dev", "test", "reserved")}
    return Splits(**parts, titles=stored["titles"])


def stable_random(*parts: object) -> random.Random:
    """Return a generator that is seeded by the text of `parts`, equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def draw_few_shot(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Draw `count` questions: each relation at least once, at most two of a country.

    Relations are served in turn, so that none is asked much more often than another, and no fact
    is drawn in two wordings. Raises UserError when `questions` do not allow it.
    """
    rng = stable_random("few-shot", seed)
    by_relation: dict[str, list[Question]] = {}
    for question in questions:
        by_relation.setdefault(question["relation"], []).append(question)
    if count < len(by_relation):
        raise UserError(f"{count} questions cannot cover {len(by_relation)} relations")
    for members in by_relation.values():
        rng.shuffle(members)
    drawn: list[Question] = []
    of_country: dict[str, int] = {}
    facts: set[tuple[str, str]] = set()
    while len(drawn) < count:
        order = sorted(by_relation)
        rng.shuffle(order)
        before = len(drawn)
        for relation in order[: count - len(drawn)]:
            for question in by_relation[relation]:
                country = question["entity"]
                if of_country.get(country, 0) < 2 and (country, relation) not in facts:
                    facts.add((country, relation))
                    of_country[country] = of_country.get(country, 0) + 1
                    drawn.append(question)
                    break
        if len(drawn) == before:
            raise UserError(
                f"only {before} of {count} few-shot questions can be drawn with at most two of a "
                "country: ask for fewer"
            )
    if {q["relation"] for q in drawn} != set(by_relation):
        raise UserError("the few-shot draw misses a relation: too few countries for it")
    rng.shuffle(drawn)
    return drawn
