"""Vocabularies of T5 (sentencepiece) and BERT (WordPiece) as `tokenizer.json`.

A sentencepiece model is a protobuf file. This module reads the few fields that a unigram tokenizer
needs and makes a tokenizer of the `tokenizers` library. So neither sentencepiece nor protobuf is
needed.

Fields used (sentencepiece_model.proto): ModelProto 1 pieces {1 piece, 2 score, 3 type},
2 trainer {3 model_type, 24 treat_whitespace_as_suffix, 40 unk_id, 35 byte_fallback},
3 normalizer {2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
5 escape_whitespaces}.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from atlas_jax.core import strict_json
from atlas_jax.core import tokenizer as core
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import read_bytes, read_text

NAMES = ("tokenizer.json", "spiece.model", "sentencepiece.model", "vocab.txt")
_SENTINEL = re.compile(r"^▁(<extra_id_\d+>)$")
SENTINELS = 100  # of every T5; the last id of the vocabulary is <extra_id_0>


@dataclasses.dataclass(frozen=True)
class _TokenizerConfig:
    """What of a `tokenizer_config.json` counts."""

    do_lower_case: bool | None = None  # true where a vocabulary is all there is


_PROBES = (
    ("question: who? answer: <extra_id_0>", "title: A context: b"),
    ("où est", "l'île de Ré"),
    ("что это", "где"),
    ("谁是", "总统"),
)


def find_tokenizer(path: Path, kind: str) -> str | None:
    """The text of a checked `tokenizer.json`, from a file or from a folder.

    Args:
      path: a folder (None is returned if it holds none of `NAMES`), a `tokenizer.json`, a
        sentencepiece model (`*.model`) or a WordPiece vocabulary (`*.txt`).
      kind: 'reader', 'retriever' or 'encoder'.

    Raises:
      UserError: the file is absent, damaged, or of a kind that the model cannot use.
    """
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            return None
        path = found[0]
    if path.suffix == ".json":
        text = _as_configured(read_text(path), path)
    elif path.suffix == ".model":
        text = from_sentencepiece(path)
    else:
        text = from_wordpiece(path, _lower_case(path.parent) is not False)
    return checked(text, kind, str(path))


def checked(text: str, kind: str, source: str) -> str:
    """The tokenizer without truncation and padding, after a few tests.

    A RoBERTa's gets padding as id 0, see `exchanged_ids`.

    Raises:
      UserError: the text is not a tokenizer; or a reader's tokenizer lacks T5's sentinels, or
        gives a joined text other ids than its halves (query and passage are tokenised apart).
    """
    if kind != "reader" and _begins_with_start(text):
        text = exchanged_ids(text)
    tokenizer = core.Tokenizer(text, source)
    content = json.loads(text)
    content["truncation"] = content["padding"] = None
    if kind == "reader":
        check_joins(tokenizer, source)
        check_sentinels(tokenizer, source)
    return json.dumps(content, ensure_ascii=False)


def check_joins(tokenizer: core.Tokenizer, source: str) -> None:
    """Refuse a reader's tokenizer if the ids of a joined text are not those of its halves.

    Raises:
      UserError: names the texts for which it fails.
    """
    for query, passage in _PROBES:
        apart = tokenizer.encode(query, False) + tokenizer.encode(passage, False)
        if apart != tokenizer.encode(f"{query} {passage}", False):
            raise UserError(
                f"{source}: {query!r} and {passage!r} give other tokens joined by a blank than "
                "apart; a reader needs a tokenizer that splits at blanks, as T5's does"
            )


def check_sentinels(tokenizer: core.Tokenizer, source: str) -> None:
    """Refuse sentinels in another order than T5's: `<extra_id_1>` is the id before `<extra_id_0>`.

    Raises:
      UserError: a sentinel is missing or out of place; names the first one.
    """
    first = tokenizer.sentinel_id(0)
    for number in range(1, SENTINELS):
        try:
            found = tokenizer.sentinel_id(number)
        except UserError:
            return  # a small vocabulary may have fewer
        if found != first - number:
            raise UserError(
                f"{source}: <extra_id_{number}> has the id {found}; in every T5 it is {number} "
                f"below that of <extra_id_0>, {first - number}"
            )


# --- RoBERTa ---------------------------------------------------------------------------


def exchanged_ids(text: str) -> str:
    """A RoBERTa's `tokenizer.json` with the ids 0 and 1 in each other's place."""
    content = json.loads(text)
    other = {0: 1, 1: 0}
    vocabulary = content["model"]["vocab"]
    for token, number in vocabulary.items():
        vocabulary[token] = other.get(number, number)
    for token in content.get("added_tokens", []):
        token["id"] = other.get(token["id"], token["id"])
    content.get("added_tokens", []).sort(key=lambda token: token["id"])
    _exchange_in_processor(content.get("post_processor") or {}, other)
    return json.dumps(content, ensure_ascii=False)


def _begins_with_start(text: str) -> bool:
    """Whether the ids 0 and 1 are `<s>` and `<pad>`, as in RoBERTa's vocabularies."""
    try:
        content = json.loads(text)
        ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (ValueError, TypeError, KeyError, AttributeError):
        return False  # what is wrong with it is said where it is read
    return (ids.get("<s>"), ids.get("<pad>")) == (0, 1)


def _exchange_in_processor(processor: dict[str, Any], other: Mapping[int, int]) -> None:
    for name in ("cls", "sep"):  # RobertaProcessing: [token, id]
        if isinstance(processor.get(name), list):
            token, number = processor[name]
            processor[name] = [token, other.get(number, number)]
    for special in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        special["ids"] = [other.get(number, number) for number in special["ids"]]
    for inner in processor.get("processors") or []:
        _exchange_in_processor(inner, other)


# --- sentencepiece ---------------------------------------------------------------------


def from_sentencepiece(path: str | Path, sentinels: int = SENTINELS) -> str:
    """A T5 sentencepiece model as the text of a `tokenizer.json`.

    Sentinels that the model does not have are added after its pieces. The last one is
    `<extra_id_0>`: 32099 for T5's 32,000 pieces.

    Raises:
      UserError: the file is cut off, no sentencepiece model, not a unigram model, or lacks
        T5's `<pad>` 0, `</s>` 1 and an unknown token.
    """
    raw = read_bytes(path)
    try:
        pieces, trainer, normalizer = _parse_model(raw)
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(f"{path}: not a whole sentencepiece model: {error}") from None
    if trainer.get(3, 1) != 1 or trainer.get(24, 0) or trainer.get(35, 0):
        raise UserError(
            f"{path}: not a plain unigram model; T5's are (model_type {trainer.get(3, 1)}, "
            f"suffix blanks {trainer.get(24, 0)}, bytes {trainer.get(35, 0)})"
        )
    # mT5 has its sentinels among the pieces, with the mark of a blank in front.
    pieces = [(_SENTINEL.sub(r"\1", piece), score, kind) for piece, score, kind in pieces]
    texts = [piece for piece, _, _ in pieces]
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == 2]
    if texts[:2] != ["<pad>", "</s>"] or len(unknown) != 1:
        raise UserError(f"{path}: begins with {texts[:3]}; a T5's model with '<pad>', '</s>'")
    tokenizer = Tokenizer(models.Unigram([(p, s) for p, s, _ in pieces], unk_id=unknown[0]))
    tokenizer.normalizer = _normalizer(normalizer)
    prefix = "always" if normalizer.get(3, 1) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme=prefix)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    specials = [texts[0], texts[1], texts[unknown[0]]]
    missing = [n for n in range(sentinels) if f"<extra_id_{n}>" not in texts]
    specials += [f"<extra_id_{n}>" for n in range(sentinels) if n not in missing]
    specials += [f"<extra_id_{n}>" for n in reversed(missing)]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return str(tokenizer.to_str())


def _normalizer(spec: dict[int, Any]) -> Any:
    steps: list[Any] = []
    if spec.get(2):
        steps.append(normalizers.Precompiled(spec[2]))
    if spec.get(4, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps)


def _parse_model(
    raw: bytes,
) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(raw):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, 1)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if len(pieces) < 3:
        raise ValueError("it has no pieces")
    return pieces, trainer, normalizer


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protobuf at byte {at}")
        if at + size > len(raw):
            raise ValueError("cut off")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"no protobuf at byte {at}")


# --- WordPiece -------------------------------------------------------------------------


def from_wordpiece(path: str | Path, lower_case: bool = True) -> str:
    """A BERT `vocab.txt` as the text of a `tokenizer.json`.

    Raises:
      UserError: the file cannot be read, a piece occurs twice, or a special token is absent.
    """
    raw = read_text(path)
    # Not splitlines: a piece may be one of Unicode's other line separators.
    pieces = [line.removesuffix("\r") for line in raw.removesuffix("\n").split("\n")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        twice = next(p for i, p in enumerate(pieces) if vocabulary[p] != i)
        raise UserError(f"{path}: the piece {twice!r} occurs twice")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    absent = [s for s in specials[:4] if s not in vocabulary]
    if absent:
        raise UserError(f"{path}: no {', '.join(absent)}; this is no vocabulary of BERT")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.add_special_tokens([s for s in specials if s in vocabulary])
    return str(tokenizer.to_str())


def _lower_case(folder: Path) -> bool | None:
    """What the folder says of it, if anything."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    config: _TokenizerConfig = strict_json.read(path, _TokenizerConfig)
    return config.do_lower_case


def _as_configured(text: str, path: Path) -> str:
    """BERT's tokenizer with the lower case that `tokenizer_config.json` says, as transformers."""
    content: dict[str, Any] = strict_json.parse_as(text.encode(), dict[str, Any], str(path))
    normalizer, told = content.get("normalizer"), _lower_case(path.parent)
    if told is None or not isinstance(normalizer, dict):
        return text
    if normalizer.get("type") != "BertNormalizer" or normalizer.get("lowercase") is told:
        return text
    return json.dumps({**content, "normalizer": {**normalizer, "lowercase": told}})
