"""Text to token ids and back, for the reader and the retriever.

A tokenizer is one `tokenizer.json` file in the format of Hugging Face's `tokenizers`
library: T5's or BERT's own, or a small one made by `datasets/tokenizer_training.py`.
"""

import bisect
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.formats import DELIBERATE, LITERAL, SENTINEL
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.panics import panics_told
from atlas_jax.core.paths import read_text
from atlas_jax.core.tokenizer_backend import (
    END_NAMES,
    MASK_NAMES,
    PAD_NAMES,
    START_NAMES,
    UNKNOWN_NAMES,
    check_unknown,
    make_backend,
    tokenizer_text,
)

_LOG = logging.getLogger(__name__)
_TOLD: set[str] = set()  # hashes of the tokenizers whose mending has been told
_MARKED = re.compile(rf"{DELIBERATE}?({SENTINEL.pattern})|{DELIBERATE}(<[^<>\s]+>|\[[^\[\]\s]+\])?")

_BEGINS = ("\u2581", "\u0120")  # before the first piece of a word: sentencepiece, byte-level
_CHARACTERS = 16  # for each token that is kept: several times what a token of any language has
_BEYOND = 128  # tokens that the end of a beginning may change: more than those of a cut word
_PROBES = ("", "a b", "\u00e9\u4e2d. ")

Side = Literal["left", "right"]


class Tokenizer:
    """A `tokenizer.json` file, ready to encode.

    Truncation and padding that the file carries are switched off: lengths are the
    business of whoever asks. The padding id must be 0 and the file must have an end token
    (`</s>` for a reader, `[SEP]` for a retriever).

    In a text, sentinels (`<extra_id_0>`) count, and other special tokens where a format brought
    them; everything else is text, see `core/formats.py`. Sentinels, padding and end tokens that
    the file has as plain pieces are taken as special ones, with a warning.

    Attributes:
      vocab_size: the greatest id plus 1, added tokens included.
      pad_id: 0.
      eos_id: id of the token that `add_special` puts last.
      cls_id: id of the token that `add_special` puts first, or None.
      unk_id: id of the unknown token, or None.
      mask_id: id of the mask token, or None.
      special_ids: ids of all special tokens, in ascending order.
      lowercases: the file's normaliser makes all letters small, so that decoded text has lost
        its writing (`answering/surface.py`).
      content_hash: SHA-256 of the file's content, whatever its layout; a store or an index
        made with another tokenizer is recognised by it.
    """

    def __init__(self, text: str, source: str = "tokenizer") -> None:
        """Take the text of a `tokenizer.json`; `source` is named in errors."""
        content: dict[str, Any] = strict_json.parse_as(text.encode(), dict[str, Any], source)
        content["truncation"] = content["padding"] = None
        self._json = tokenizer_text(content)
        try:
            with panics_told(source):
                self._backend, self._special, mended = make_backend(content)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{source}: not a tokenizer.json file: {one_line(error)}") from error
        self._source = source
        self.content_hash = hashlib.sha256(self._json.encode("utf-8")).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        self.lowercases = _lowercases(content.get("normalizer"))
        self.unk_id = self._first_id(UNKNOWN_NAMES)
        self.cls_id = self._first_id(START_NAMES)
        self.mask_id = self._first_id(MASK_NAMES)
        self.special_ids = tuple(sorted(vocabulary[f"{DELIBERATE}{n}"] for n in self._special))
        self.pad_id = self._required_id(PAD_NAMES, "padding")
        self.eos_id = self._required_id(END_NAMES, "end")
        if self.pad_id != 0:
            raise UserError(f"{source}: the padding token has id {self.pad_id}, but must have 0")
        with panics_told(source):
            check_unknown(self._backend, source)
            self._try(source)
        if mended and self.content_hash not in _TOLD:
            _TOLD.add(self.content_hash)
            _LOG.warning("%s: %s", source, "; ".join(mended))

    def _try(self, source: str) -> None:
        """What works once, there and back, will not break a run.

        Raises:
          UserError: it does not.
        """
        try:
            for probe in _PROBES:
                self._backend.decode(self._backend.encode(probe).ids)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{source}: it encodes no text: {one_line(error)}") from error

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load a `tokenizer.json` file.

        Raises:
          UserError: there is no such file, it is no tokenizer, or it lacks the padding
            token (with id 0), the end token, or one for characters that it lacks.
        """
        return cls(read_text(path), source=str(path))

    @property
    def text(self) -> str:
        """The file's content, as `save` writes it."""
        return self._json

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `tokenizer.json`; it loads with the same content hash."""
        with atomic_text(path) as file:
            file.write(self._json)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of one text; with `add_special`, the file's special tokens around them."""
        ids: list[int] = self._backend.encode(
            self._prepared(text), add_special_tokens=add_special
        ).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        """Ids of many texts in one call, which is several times faster than one by one."""
        prepared = [self._prepared(text) for text in texts]
        encodings = self._backend.encode_batch_fast(prepared, add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]

    def encode_starts(
        self, texts: Sequence[str], add_special: bool, length: int
    ) -> list[list[int]]:
        """Like `encode_batch`, where only the first `length` tokens of each text will be kept.

        Of a text with many more only the beginning is encoded. Its row has more than `length`
        tokens, too, and the first `length` are those of the whole text. So a passage of 10 MB, by
        mistake, costs no more than others.
        """
        size, wanted = _CHARACTERS * length, length + _BEYOND
        starts = [_start_of(text, size) for text in texts]
        rows = self.encode_batch(starts, add_special)
        for number, text in enumerate(texts):
            read = size
            while len(starts[number]) < len(text) and len(rows[number]) < wanted:
                read *= 4  # long words that become one unknown token
                starts[number] = _start_of(text, read)
                rows[number] = self.encode_batch([starts[number]], add_special)[0]
        return rows

    def unknown_shares(self, texts: Sequence[str]) -> list[float]:
        """Which share of each text's characters, blanks apart, becomes unknown tokens."""
        if self.unk_id is None:
            return [0.0] * len(texts)
        shares = []
        for text, encoding in zip(
            texts, self._backend.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            unknown = "".join(text[a:b] for token, (a, b) in pairs if token == self.unk_id)
            shares.append(len("".join(unknown.split())) / max(len("".join(text.split())), 1))
        return shares

    def first_tokens(self, text: str, count: int) -> str:
        """The start of the text that holds its first `count` tokens, or all of a shorter one."""
        if count <= 0:
            return ""
        prepared = self._prepared(text)
        offsets = self._backend.encode(prepared, add_special_tokens=False).offsets
        if len(offsets) <= count:
            return text
        end = offsets[count - 1][1]
        if prepared is text:
            return text[:end]
        # with marks taken out or put in, count what the beginning becomes
        sizes = range(len(text) + 1)
        return text[
            : bisect.bisect_right(sizes, end, key=lambda n: len(self._prepared(text[:n]))) - 1
        ]

    def last_tokens(self, text: str, count: int) -> str:
        """The end of the text that holds its last `count` tokens, or all of a shorter one."""
        if count <= 0:
            return ""
        prepared = self._prepared(text)
        offsets = self._backend.encode(prepared, add_special_tokens=False).offsets
        if len(offsets) <= count:
            return text
        start = offsets[-count][0]
        if prepared is text:
            return text[start:]
        size = len(prepared) - start  # with marks taken out or put in, count from the end
        cut = bisect.bisect_left(
            range(len(text)), -size, key=lambda at: -len(self._prepared(text[at:]))
        )
        return text[cut:]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Text of the ids, without blanks at the ends; special tokens are left out if asked."""
        return self.decode_batch([list(ids)], skip_special)[0]

    def decode_batch(
        self, rows: Sequence[Sequence[int]] | np.ndarray, skip_special: bool = True
    ) -> list[str]:
        """Texts of many rows of ids (lists or an integer array)."""
        plain = [row.tolist() if isinstance(row, np.ndarray) else list(row) for row in rows]
        texts = self._backend.decode_batch(plain, skip_special_tokens=skip_special)
        return [text.replace(DELIBERATE, "").strip() for text in texts]

    def sentinel_id(self, number: int) -> int:
        """Id of `<extra_id_{number}>`.

        Raises:
          UserError: the tokenizer has no such sentinel.
        """
        token = self._first_id([f"<extra_id_{number}>"])
        if token is None:
            raise UserError(
                f"{self._source}: no token <extra_id_{number}>; span corruption and question "
                "answering need a tokenizer with T5's sentinels"
            )
        return token

    def word_starts(self) -> np.ndarray:
        """For each id, bool [vocab_size]: whether its piece begins a word.

        WordPiece marks the pieces that go on (`##ing`), sentencepiece and byte-level vocabularies
        those that begin.

        Raises:
          UserError: the vocabulary marks neither.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        goes_on = any(piece.startswith("##") and len(piece) > 2 for piece in vocabulary)
        marks = next((m for m in _BEGINS if any(p.startswith(m) for p in vocabulary)), "")
        if not goes_on and not marks:
            raise UserError(
                f"{self._source}: its pieces do not say where a word begins, so only single "
                "tokens can be masked (MaskingConfig.kind = 'token')"
            )
        starts = np.ones(self.vocab_size, bool)
        for piece, token in vocabulary.items():
            starts[token] = piece.startswith(marks) if marks else not piece.startswith("##")
        return starts

    def pad_to(
        self, rows: Sequence[Sequence[int]], length: int, truncate: Side = "right"
    ) -> np.ndarray:
        """Rows of ids as one int32 array `[len(rows), length]`, padded with 0 on the right.

        A row that is too long loses tokens on the side `truncate`, but keeps the special
        tokens at its ends: the end token and, if the tokenizer has one, the start token.

        Raises:
          UserError: `length` is too short for the special tokens alone.
        """
        fitted = [row if len(row) <= length else self._cut(row, length, truncate) for row in rows]
        lengths = np.fromiter(map(len, fitted), np.int64, len(fitted))
        padded = np.zeros((len(fitted), length), np.int32)
        real = np.arange(length) < lengths[:, None]
        padded[real] = np.fromiter(chain.from_iterable(fitted), np.int32, int(lengths.sum()))
        return padded

    def _cut(self, row: Sequence[int], length: int, truncate: Side) -> Sequence[int]:
        head = 1 if row[0] == self.cls_id else 0
        tail = 1 if row[-1] == self.eos_id else 0
        room = length - head - tail
        if room < 0:
            raise UserError(f"length {length} is too short for the special tokens of a text")
        inner = row[head : len(row) - tail]
        kept = inner[:room] if truncate == "right" else inner[len(inner) - room :]
        return [*row[:head], *kept, *row[len(row) - tail :]]

    def _first_id(self, names: Sequence[str]) -> int | None:
        for name in names:
            token = self._backend.token_to_id(f"{DELIBERATE}{name}")
            if token is not None:
                return int(token)
        return None

    def _prepared(self, text: str) -> str:
        """The text as the backend reads it: special tokens by their inner names, no marks."""
        if "<extra_id_" not in text and DELIBERATE not in text and LITERAL not in text:
            return text

        def inner(found: re.Match[str]) -> str:
            name = found[1] or found[2] or ""
            return f"{DELIBERATE}{name}" if name in self._special else name

        return _MARKED.sub(inner, text).replace(LITERAL, "")

    def _required_id(self, names: Sequence[str], role: str) -> int:
        token = self._first_id(names)
        if token is None:
            raise UserError(f"{self._source}: no {role} token ({' or '.join(names)})")
        return token


def _start_of(text: str, size: int) -> str:
    """At most so many characters of the text, cut at a blank where there is one."""
    if len(text) <= size:
        return text
    return text[: max(text.rfind(" ", size // 2, size), 0) or size]


def _lowercases(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    inner = normalizer.get("normalizers") or ()
    return (
        bool(normalizer.get("lowercase"))
        or normalizer.get("type") == "Lowercase"
        or any(map(_lowercases, inner))
    )
