"""LM-BFF's demonstrations: behind a prompt one labelled example of each class, drawn anew.

    [CLS] text It was [MASK] . [SEP] example It was terrible . [SEP] example It was great . [SEP]

Examples come from the labelled lines, in the order of the labels, each in the task's template with
its label's first word at the mask. In training each use of a line draws others, never the line
itself. In evaluation the logits are averaged over several draws (LM-BFF: src/dataset.py,
src/trainer.py; 16 draws). With 'similar' they are drawn from the more similar share of each class
(there by a sentence encoder's embeddings, here by the mean states of the run's own encoder before
training).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.tasks.base import Record
from atlas_jax.tasks.classification import ClassificationTask
from atlas_jax.training.classifier_config import DemonstrationConfig
from atlas_jax.training.prompted import Texts, prompt_texts


@dataclasses.dataclass(frozen=True)
class Demonstrated:
    """Texts, each with examples that are drawn when its row is taken.

    Attributes:
      texts: alone, [n, l].
      shown: tokens of every labelled line as an example, without padding.
      candidates: by text, by label: the examples that may be drawn.
      length: of a row.
      seed: of the draws.
      draw: the number of the draw of rows that name none.
    """

    texts: Texts
    shown: Sequence[np.ndarray]
    candidates: Sequence[Sequence[np.ndarray]]
    length: int
    seed: int
    draw: int = 0

    @property
    def tokens_bl(self) -> np.ndarray:
        """The texts' tokens alone."""
        return np.asarray(self.texts.tokens_bl)

    @property
    def labels_b(self) -> Any:
        """As in `Texts`."""
        return self.texts.labels_b

    def at(self, draw: int) -> "Demonstrated":
        """The same texts with the examples of another draw."""
        return dataclasses.replace(self, draw=draw)

    def rows(self, index: np.ndarray) -> Texts:
        """Rows with their examples, on the host.

        Args:
          index: numbers of texts [b], or of texts and draws [b, 2].
        """
        index = np.asarray(index)
        if index.ndim == 1:
            index = np.stack([index, np.full_like(index, self.draw)], axis=1)
        some = self.texts.rows(index[:, 0])
        tokens_bl = np.zeros((len(index), self.length), np.int32)
        for row, (number, draw) in enumerate(index.tolist()):
            rng = np.random.default_rng([self.seed, draw, number])
            chosen = [self.shown[rng.choice(own)] for own in self.candidates[number]]
            own = np.asarray(some.tokens_bl[row])
            tokens = np.concatenate([own[own != 0], *chosen])
            tokens_bl[row, : len(tokens)] = tokens
        return some.replace(tokens_bl=tokens_bl, types_bl=np.zeros_like(tokens_bl))  # type: ignore[attr-defined]


def as_examples(
    task: ClassificationTask, records: Sequence[Record], tokenizer: Tokenizer, length: int
) -> list[np.ndarray]:
    """Labelled lines in the template with their label's first word, without a start token.

    Raises:
      UserError: the template does not fit into `length`; names the line.
    """
    first = 0 if tokenizer.cls_id is None else 1
    texts = prompt_texts(task, records, tokenizer, length + first)
    words_c = task.verbaliser.tokens(task.template, tokenizer).ids_cw[:, 0]
    examples = []
    rows = zip(texts.tokens_bl, texts.mask_at_b, texts.labels_b, strict=True)
    for tokens_l, at, label in rows:
        own = np.array(tokens_l)
        own[at] = words_c[label]
        examples.append(own[first:][own[first:] != 0])
    return examples


def candidates(
    labels_s: Int[np.ndarray, " s"],
    names: Sequence[Any],
    own: Sequence[int | None],
    config: DemonstrationConfig,
    likeness_ns: Float[np.ndarray, "n s"] | None = None,
) -> list[list[np.ndarray]]:
    """By text, by label: the examples that it may be shown.

    Args:
      labels_s: of the examples.
      names: of the labels.
      own: the example that each text is itself; None = it is none of them.
      config: the share that 'similar' keeps of a class, at least one.
      likeness_ns: of each text to each example; None = all may be shown.

    Raises:
      UserError: too few examples of a label.
    """
    by_label = [np.flatnonzero(labels_s == label) for label in range(len(names))]
    least = 2 if any(one is not None for one in own) else 1
    for name, places in zip(names, by_label, strict=True):
        if len(places) < least:
            raise UserError(
                f"DemonstrationConfig.kind = {config.kind!r}: the label {name!r} has "
                f"{len(places)} labelled lines; every label needs {least} or more, since a line "
                "is never its own example"
            )
    kept = []
    for text, itself in enumerate(own):
        row = [places[places != itself] for places in by_label]
        if likeness_ns is not None:
            row = [_best(places, likeness_ns[text], config.share) for places in row]
        kept.append(row)
    return kept


def _best(places: np.ndarray, likeness_s: np.ndarray, share: float) -> np.ndarray:
    count = max(1, int(len(places) * share))
    return places[np.argsort(-likeness_s[places], kind="stable")[:count]]


def likeness(
    texts_nd: Float[np.ndarray, "n d"], examples_sd: Float[np.ndarray, "s d"]
) -> Float[np.ndarray, "n s"]:
    """Cosines of two sets of features, [n, s]."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return unit(texts_nd) @ unit(examples_sd).T


def demonstrated(
    task: ClassificationTask,
    records: Sequence[Record],
    support: Sequence[Record],
    tokenizer: Tokenizer,
    length: int,
    config: DemonstrationConfig,
    seed: int,
    features: Callable[[Sequence[Record]], np.ndarray] | None = None,
) -> Demonstrated:
    """Records with examples from `support` behind them.

    Args:
      records: to classify; where they are `support` itself, none is its own example.
      length: of a row.
      seed: of the draws.
      features: of records [n, d], for 'similar'.

    Raises:
      UserError: no room, a template that does not fit, or too few examples of a label.
    """
    of_text, of_example = config.lengths(length, len(task.labels))
    texts = prompt_texts(task, records, tokenizer, of_text)
    shown = as_examples(task, support, tokenizer, of_example)
    places = {label: number for number, label in enumerate(task.labels)}
    labels_s = np.array([places[record.fields[task.label]] for record in support])
    own = [number if records is support else None for number in range(len(records))]
    alike = None
    if config.kind == "similar":
        assert features is not None, "similar examples are chosen by features"
        alike = likeness(features(records), features(support))
    kept = candidates(labels_s, task.labels, own, config, alike)
    return Demonstrated(texts, shown, kept, length, seed)
