"""Tasks `bart` and `mass`: write a passage, or a run of its words, from a damaged passage.

Sources: BART (arXiv 1910.13461; fairseq, denoising_dataset.py) and MASS (arXiv 1905.02450;
masked_dataset.py). Both count tokens; here words are counted, so that no tokenizer is needed, and
T5's first sentinel is the mask. As with the other pretext tasks, passages can be retrieved to help.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from atlas_jax.core.formats import Filled, fill, literal
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.tasks.base import (
    Example,
    Prediction,
    Record,
    check_format,
    score_answers,
    score_retrieval,
)
from atlas_jax.tasks.pretext import check_range, load_passages
from atlas_jax.tasks.sentences import split_sentences

MASK = "<extra_id_0>"
_FIELDS = ("text", "title", "section")


@dataclasses.dataclass(frozen=True)
class _Damaged:
    """Fields of both tasks.

    Attributes:
      min_words: passages of fewer words are left out.
      query_format: the reader's query, of {text} (damaged), {title}, {section}.
      retriever_format: the retriever's query; its {text} has no masks. '' = the reader's.
      filter_self: the passage itself may not be retrieved, since the answer is in it.
      filter_self_after: first training step at which `filter_self` applies.
    """

    min_words: int = 10
    query_format: str = "{text}"
    retriever_format: str = "{text}"
    filter_self: bool = True
    filter_self_after: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
          UserError: names the binding.
        """
        owner = type(self).__name__
        for name in ("query_format", "retriever_format"):
            check_format(f"{owner}.{name}", getattr(self, name), _FIELDS)
        check_range(f"{owner}.min_words", self.min_words, self.min_words >= 2, "2 or more")

    def load(
        self, path: str | Path, need_targets: bool = True, rows: RowsConfig = STRICT
    ) -> Sequence[Record]:
        """See `Task.load`; passages of fewer than `min_words` words are left out."""
        return load_passages(path, self.min_words, f"{type(self).__name__}.min_words", rows)

    def example(
        self, record: Record, rng: np.random.Generator | None = None, step: int = 0
    ) -> Example:
        """See `Task.example`; what varies is the damage."""
        if rng is None:
            rng = np.random.default_rng(zlib.crc32(record.id.encode("utf-8")))
        pieces, target = self._damage(record.fields["text"], rng)
        query = " ".join(MASK if piece is None else literal(piece) for piece in pieces)
        bare = " ".join(piece for piece in pieces if piece is not None)
        rest = {name: record.fields.get(name) or "" for name in ("title", "section")}
        hidden = self.filter_self and step >= self.filter_self_after
        return Example(
            id=record.id,
            query_text=fill(self.query_format, text=Filled(query), **rest),
            retriever_text=fill(self.retriever_format, text=bare, **rest),
            target_text=literal(target),
            answers=(target,),
            excluded_ids=(record.id,) if hidden else (),
            given_passages=record.passages,
            meta={"title": rest["title"], **record.meta},
        )

    def evaluate(
        self, predictions: Sequence[Prediction], recall_at: Sequence[int] = (1, 5, 20)
    ) -> dict[str, float]:
        """Exact match, F1, ROUGE-1, -2 and -L of the target; recall as in `tasks.base`."""
        return score_answers(predictions, rouge=True) | score_retrieval(predictions, recall_at)

    def _damage(self, text: str, rng: np.random.Generator) -> tuple[list[str | None], str]:
        """What is left of the text, None being a mask, and what has to be written."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BartTask(_Damaged):
    """Lines `{id, title?, section?, text}`; the target is the whole text (BART's infilling).

    Spans of Poisson length are masked, each by one mask; a span of no words puts a mask in.
    Sentences stand in a random order.

    Attributes:
      noise_density: share of the words that is masked; released: 0.3.
      mean_span_words: mean of the Poisson distribution; released: 3.5.
      permute_sentences: put the sentences into a random order.
    """

    noise_density: float = 0.3
    mean_span_words: float = 3.5
    permute_sentences: bool = True

    name: ClassVar[str] = "bart"

    def __post_init__(self) -> None:
        """As in `_Damaged`."""
        super().__post_init__()
        density, mean = self.noise_density, self.mean_span_words
        check_range("BartTask.noise_density", density, 0 < density < 1, "between 0 and 1")
        check_range("BartTask.mean_span_words", mean, mean > 0, "more than 0")

    def _damage(self, text: str, rng: np.random.Generator) -> tuple[list[str | None], str]:
        sentences = split_sentences(text)
        if self.permute_sentences:
            sentences = [sentences[i] for i in rng.permutation(len(sentences))]
        words: list[Any] = " ".join(sentences).split()
        masked = min(max(round(self.noise_density * len(words)), 1), len(words) - 1)
        lengths = list[int]()
        while sum(lengths) < masked:
            lengths.append(int(rng.poisson(self.mean_span_words)))
        lengths[-1] -= sum(lengths) - masked
        # Spans and kept words in a random order; the kept words keep theirs.
        spans = [length for length in lengths if length]
        is_span = rng.permutation(len(words) - masked + len(spans)) < len(spans)
        pieces: list[str | None] = []
        at, lengths_left = 0, iter(spans)
        for masks in is_span:
            pieces.append(None if masks else words[at])
            at += next(lengths_left) if masks else 1
        for _ in range(len(lengths) - len(spans)):
            pieces.insert(int(rng.integers(len(pieces) + 1)), None)
        return pieces, " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class MassTask(_Damaged):
    """Lines `{id, title?, section?, text}`; the target is one run of words that is masked.

    Each word of the run has a mask of its own, so the run keeps its length and its place. As in
    BERT, 8 of 10 words become masks, one another word (here one of the passage) and one stays.

    Attributes:
      noise_density: share of the words that the run has; the paper: half.
    """

    noise_density: float = 0.5

    name: ClassVar[str] = "mass"

    def __post_init__(self) -> None:
        """As in `_Damaged`."""
        super().__post_init__()
        density = self.noise_density
        check_range("MassTask.noise_density", density, 0 < density < 1, "between 0 and 1")

    def _damage(self, text: str, rng: np.random.Generator) -> tuple[list[str | None], str]:
        words = text.split()
        size = min(max(round(self.noise_density * len(words)), 1), len(words) - 1)
        start = int(rng.integers(len(words) - size + 1))
        pieces: list[str | None] = list(words)
        for place in range(start, start + size):
            luck = rng.random()
            if luck < 0.8:
                pieces[place] = None
            elif luck < 0.9:
                pieces[place] = words[int(rng.integers(len(words)))]
        return pieces, " ".join(words[start : start + size])
