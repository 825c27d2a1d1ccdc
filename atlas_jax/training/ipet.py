"""What iPET's members learn next: lines that the others have labelled.

Source: pet (modeling.py: generate_ipet_train_sets).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from atlas_jax.tasks.base import Record
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.training.pet_config import PetConfig


def weighted_mean(logits: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The members' logits [n, c], averaged by what each counts; all alike where none counts."""
    total = sum(weights)
    shares = [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)
    stacked_mnc = np.stack([np.asarray(one, np.float64) for one in logits])
    return np.einsum("m,mnc->nc", np.asarray(shares), stacked_mnc)


def new_lines(
    config: PetConfig,
    task: ClassificationTask,
    records: tuple[Sequence[Record], Sequence[Record]],
    logits: Sequence[np.ndarray],
    weights: Sequence[float],
    generation: int,
) -> list[list[Record]]:
    """For each member, lines labelled by a random share of the others.

    Args:
      config: of the run.
      task: with the labels.
      records: labelled lines, and unlabelled ones.
      logits: what each member of the generation before says of the unlabelled lines, [n, c].
      weights: what each member counts.
      generation: the one that will learn, from 1.

    Returns:
      Records with labels, for each member. A label has the share that it has of the labelled lines.
      Where fewer lines are given a label than are wanted, all of them are taken (the original
      fills up with lines that were given another).
    """
    labelled, unlabelled = records
    rng = np.random.Generator(np.random.Philox(key=[config.seed, generation]))
    wanted = int(len(labelled) * config.generation_factor**generation) - len(labelled)
    shares = [
        sum(record.fields[task.label] == label for record in labelled) / len(labelled)
        for label in task.labels
    ]
    sets = []
    for member in range(len(logits)):
        others = [number for number in range(len(logits)) if number != member]
        count = max(1, round(config.generation_share * len(others)))
        chosen = rng.choice(others, count, replace=False)
        said_nc = weighted_mean([logits[i] for i in chosen], [weights[i] for i in chosen])
        rows = _drawn(said_nc, [int(wanted * share) for share in shares], rng)
        sets.append([
            dataclasses.replace(
                unlabelled[row], fields={**unlabelled[row].fields, task.label: task.labels[label]}
            )
            for row, label in rows
        ])  # fmt: skip
    return sets


def _drawn(
    logits_nc: np.ndarray, wanted: Sequence[int], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(row, label) of the lines that are given each label, surer ones more often, none twice."""
    shifted_nc = logits_nc - logits_nc.max(axis=1, keepdims=True)
    shares_nc = np.exp(shifted_nc) / np.exp(shifted_nc).sum(axis=1, keepdims=True)
    found = []
    for label, count in enumerate(wanted):
        rows = np.flatnonzero(shares_nc.argmax(axis=1) == label)
        if count < len(rows):
            sure = shares_nc[rows, label]
            rows = rng.choice(rows, count, replace=False, p=sure / sure.sum())
        found += [(int(row), label) for row in rows]
    return found
