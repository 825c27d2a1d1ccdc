"""Texts as an encoder's pretraining reads them: chunks of sentences, and pairs of chunks.

Sources: google-research/bert and albert (create_pretraining_data.py). The originals write their
instances to a file, in 10 to 40 copies. Here a chunk is cut and paired anew each time that it is
read, by the seed and the place in the stream alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import grain
import numpy as np

from atlas_jax.core.errors import UserError
from atlas_jax.core.file_sets import read_passages
from atlas_jax.core.jsonl import STRICT, RowsConfig
from atlas_jax.core.progress import show_progress
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Array
from atlas_jax.tasks.sentences import split_sentences

_BATCH = 512  # documents per call of the tokenizer
_PREFETCH = 4
_SHORTEST = 2  # tokens of a chunk that is cut short by chance


@flax.struct.dataclass
class EncoderBatch:
    """Rows of pretraining.

    Attributes:
      tokens_bl: int32, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, pad 0.
      types_bl: int32, 1 for B and the token after it.
      labels_b: int32; 1 for a pair that is swapped (SOP) or not from one text (NSP).
    """

    tokens_bl: Array
    types_bl: Array
    labels_b: Array


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised texts.

    Attributes:
      tokens: int32, of all sentences, one after the other.
      ends: the end of each sentence in `tokens`, after a first 0.
      first: number of each document's first sentence, and the number of all sentences at the end.
    """

    tokens: np.ndarray
    ends: np.ndarray
    first: np.ndarray

    def sentence(self, number: int) -> np.ndarray:
        """Its tokens."""
        return self.tokens[self.ends[number] : self.ends[number + 1]]

    def between(self, start: int, end: int) -> np.ndarray:
        """Tokens of the sentences from `start` to before `end`."""
        return self.tokens[self.ends[start] : self.ends[end]]


def read_documents(
    path: str, tokenizer: Tokenizer, longest: int, joins_titles: bool, rows: RowsConfig = STRICT
) -> Documents:
    """Read and tokenise the passages of a file, folder or pattern, in any layout of a corpus.

    Args:
      path: what is read.
      tokenizer: of the encoder.
      longest: tokens of a sentence; a longer one is divided.
      joins_titles: neighbouring passages of one title are one document; else each passage is one.
      rows: what happens to a broken line.

    Raises:
      UserError: names file and line; or there is no text.
    """
    sizes: list[int] = []
    counts: list[int] = []
    pieces: list[np.ndarray] = []
    for batch in _batched(_texts(path, joins_titles, rows)):
        sentences = [_spaced(s for text in one for s in split_sentences(text)) for one in batch]
        ids = iter(tokenizer.encode_batch([s for one in sentences for s in one], False))
        for one in sentences:
            count = 0
            for row in (next(ids) for _ in one):
                for start in range(0, len(row), longest):
                    piece = np.asarray(row[start : start + longest], np.int32)
                    pieces.append(piece)
                    sizes.append(len(piece))
                    count += 1
            if count:
                counts.append(count)
    if not pieces:
        raise UserError(f"{path}: no passage has any text that the tokenizer knows")
    return Documents(
        np.concatenate(pieces),
        np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
    )


def _texts(path: str, joins_titles: bool, rows: RowsConfig) -> Iterator[list[str]]:
    """The passages of each document."""
    title, texts = "", list[str]()
    records = show_progress("read texts", read_passages(path, rows=rows))
    for _, record in records:
        own = str(record.get("title") or "")
        if texts and not (joins_titles and own and own == title):
            yield texts
            texts = []
        title = own
        texts.append(str(record["text"]).strip())
    if texts:
        yield texts


def _batched(documents: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    for texts in documents:
        batch.append(texts)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _spaced(sentences: Iterable[str]) -> list[str]:
    """With a blank before all but the first, which byte-level vocabularies take for a word's."""
    return [f" {sentence}" if number else sentence for number, sentence in enumerate(sentences)]


def cut_chunks(
    documents: Documents, room: int, short_rate: float, seed: int, least: int = 1
) -> np.ndarray:
    """Consecutive sentences of each document up to a length: int64 [n, 3].

    Args:
      room: tokens that a row has for text.
      short_rate: share of the chunks whose length is drawn from 2 to `room`.
      seed: of these draws.
      least: sentences that a chunk must have; one with fewer is left out.

    Returns:
      Of each chunk: document, first sentence, and the sentence after its last.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chunks: list[tuple[int, int, int]] = []

    def target() -> int:
        return int(rng.integers(_SHORTEST, room + 1)) if rng.random() < short_rate else room

    for document in range(len(documents.first) - 1):
        start, last = int(documents.first[document]), int(documents.first[document + 1])
        wanted = target()
        for end in range(start + 1, last + 1):
            size = documents.ends[end] - documents.ends[start]
            if size >= wanted or end == last:
                if end - start >= least:
                    chunks.append((document, start, end))
                start, wanted = end, target()
    return np.asarray(chunks, np.int64).reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes rows of tokens of chunks.

    Attributes:
      documents, chunks: see `read_documents` and `cut_chunks`.
      length: of a row in tokens.
      pairs: '' (one chunk a row), 'nsp' or 'sop'.
      start_id, end_id: the special tokens around a text.

    NSP: A is the beginning of a chunk; B is its rest (label 0) or, for every second row and for
    every chunk of one sentence, sentences from a random place of another document (label 1). The
    original puts the sentences that are not used then back into the stream; here another epoch
    draws another cut. SOP: A and B are the two halves of a chunk, cut at a random sentence, and
    for every second row swapped (label 1). A chunk of one sentence has no two halves: with such
    chunks among them ('sop' as released) B comes from another document, label 1.
    """

    documents: Documents
    chunks: np.ndarray
    length: int
    pairs: str
    start_id: int
    end_id: int

    def row(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens and types [length] and the label of a chunk, cut and paired by `rng`."""
        document, start, end = map(int, self.chunks[number])
        if not self.pairs:
            tokens = self.documents.between(start, end)[: self.length - 2]
            return self._framed(tokens, None, 0)
        cut = int(rng.integers(start + 1, end)) if end - start > 1 else end
        first = self.documents.between(start, cut)
        swaps, label = rng.random() < 0.5, 0
        if cut == end or (self.pairs == "nsp" and swaps):
            second, label = self._elsewhere(document, len(first), rng), 1
        else:
            second = self.documents.between(cut, end)
            if self.pairs == "sop" and swaps:
                first, second, label = second, first, 1
        first, second = _shortened(first, second, self.length - 3, rng)
        return self._framed(first, second, label)

    def _elsewhere(self, document: int, taken: int, rng: np.random.Generator) -> np.ndarray:
        """Sentences from a random place of another document, up to what is left of the row."""
        number = len(self.documents.first) - 1
        other = (document + 1 + int(rng.integers(number - 1))) % number
        begin, last = int(self.documents.first[other]), int(self.documents.first[other + 1])
        start = int(rng.integers(begin, last))
        room = max(self.length - 3 - taken, 1)
        ends = self.documents.ends
        end = start + 1
        while end < last and ends[end] - ends[start] < room:
            end += 1
        return self.documents.between(start, end)

    def _framed(
        self, first: np.ndarray, second: np.ndarray | None, label: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        tokens, types = np.zeros(self.length, np.int32), np.zeros(self.length, np.int32)
        size = len(first) + 2
        tokens[:size] = [self.start_id, *first, self.end_id]
        if second is not None:
            whole = size + len(second) + 1
            tokens[size:whole] = [*second, self.end_id]
            types[size:whole] = 1
        return tokens, types, label


def _shortened(
    first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut tokens off the longer of two, in front or at the end with 1/2 each, until both fit."""
    while len(first) + len(second) > room:
        is_front = rng.random() < 0.5
        if len(first) > len(second):
            first = first[1:] if is_front else first[:-1]
        else:
            second = second[1:] if is_front else second[:-1]
    return first, second


def encoder_batches(
    maker: RowMaker, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> Any:
    """Endless batches; the chunks are shuffled anew in each epoch.

    A row depends on the seed and its place in the stream alone, as in `data.training_batches`.

    Args:
      maker: makes the rows.
      batch_size: rows of a step over all processes.
      seed: decides order, cuts and pairs.
      rows: rows of each batch that this process makes; None = all.

    Returns:
      A grain iterator of `EncoderBatch` (numpy) with a state.
    """
    mine = range(batch_size) if rows is None else rows

    def make(step: int, chunks: Sequence[int]) -> EncoderBatch:
        made = []
        for row in mine:
            rng = np.random.Generator(np.random.Philox(key=[seed, step * batch_size + row]))
            made.append(maker.row(int(chunks[row]), rng))
        tokens, types, labels = zip(*made, strict=True)
        return EncoderBatch(np.stack(tokens), np.stack(types), np.asarray(labels, np.int32))

    stream = grain.MapDataset.range(len(maker.chunks)).seed(seed).shuffle().repeat()
    batches = stream.batch(batch_size, drop_remainder=True, batch_fn=list).map_with_index(make)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(batches.to_iter_dataset(options))
