"""Prompts for classification: a template with one mask, and the words that stand for the labels.

    {premise!drop} ? {mask} , {hypothesis!lower}

A template is text with the fields of a line and exactly one `{mask}`. `{name!drop}` is a field
without its last character if that is punctuation (the originals drop the last character blindly),
`{name!lower}` a field whose first letter is small. A field may lose tokens at its end so that the
whole fits; the rest of the template never does, and so the mask is never cut. In an encoder
`{mask}` is the mask token, in the reader `<extra_id_0>`.

An encoder with a trained prompt (`DeltaConfig.kind = 'prompt'`) reads its vectors at the marks
`{soft}` (one vector) and `{soft!3}` (three), in their order.

A verbaliser gives each label one or more words, each of which is one token where the mask stands.

Sources: LM-BFF (src/dataset.py), PET (pet/pvp.py).
"""

import dataclasses
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.core.errors import UserError, nearest
from atlas_jax.core.formats import SENTINEL, Filled, deliberate, literal
from atlas_jax.core.shortening import Shorten, shortened
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.tokenizer_backend import MASK_NAMES

MASK, SOFT = "mask", "soft"
READER_MASK = "<extra_id_0>"
CHANGES = ("drop", "lower")

_SLOT = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ANY_TEXT = "a"  # stands in the fields where words are tried


def _changed(value: str, change: str) -> str:
    """A field's text as `{name!change}` has it."""
    if change == "drop" and value and unicodedata.category(value[-1]).startswith("P"):
        return value[:-1]
    return value[:1].lower() + value[1:] if change == "lower" else value


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A field in a template, the mask, or vectors of a trained prompt."""

    name: str
    change: str = ""

    @property
    def count(self) -> int:
        """How many vectors of a trained prompt it stands for; 0 for a field and the mask."""
        return int(self.change or 1) if self.name == SOFT else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A filled template: its text, and the parts of it that may be cut."""

    text: str
    cuts: tuple[Shorten, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
      text: as it was written.
      binding: where, for messages.
      pieces: texts and slots in order.
    """

    text: str
    binding: str
    pieces: tuple[str | Slot, ...]

    @classmethod
    def parse(cls, text: str, fields: Sequence[str], binding: str) -> "Template":
        """Read a template over these fields.

        Raises:
          UserError: names the binding, and what is wrong: an unknown field or change, no mask or
            several, no field, a brace without its other half, a special token in the text.
        """
        where = f"{binding} = {text!r}"
        pieces: list[str | Slot] = []
        at = 0
        for found in _SLOT.finditer(text):
            pieces.append(text[at : found.start()])
            at = found.end()
            if found[0] in ("{{", "}}"):
                pieces.append(found[0][0])
            elif found[1] is None:
                raise UserError(f"{where}: a single {found[0]!r}; {{{{ and }}}} stand for braces")
            else:
                pieces.append(_slot(found[1], fields, where))
        pieces.append(text[at:])
        slots = [piece for piece in pieces if isinstance(piece, Slot)]
        masks = sum(slot.name == MASK for slot in slots)
        if masks != 1:
            raise UserError(f"{where}: {masks} times {{mask}}; a template has it exactly once")
        if all(slot.name in (MASK, SOFT) for slot in slots):
            names = " or ".join(f"{{{field}}}" for field in fields)
            raise UserError(f"{where}: it asks nothing of a line; put {names} into it")
        for name in (*MASK_NAMES, *SENTINEL.findall(text)):
            if name in text:
                raise UserError(f"{where}: write {{mask}} in place of {name}")
        return cls(text, binding, tuple(piece for piece in pieces if piece))

    @property
    def soft(self) -> int:
        """How many vectors of a trained prompt it has."""
        return sum(piece.count for piece in self.pieces if isinstance(piece, Slot))

    @property
    def masked(self) -> int:
        """How many vectors stand before the mask."""
        count = 0
        for piece in self.pieces:
            if isinstance(piece, Slot):
                if piece.name == MASK:
                    break
                count += piece.count
        return count

    def filled(self, values: Mapping[str, Any], mask: str, soft: str = "") -> Prompt:
        """The template over a line's fields.

        Args:
          values: the fields' texts; special tokens in them are text.
          mask: what stands at the mask, see `mask_text` and `READER_MASK`.
          soft: what stands at each vector of a trained prompt; '' = the mask, see
            `encode_prompts`.
        """
        text, cuts = "", []
        for piece in self.pieces:
            if isinstance(piece, str):
                text += deliberate(piece)
            elif piece.name == MASK:
                text += mask
            elif piece.name == SOFT:
                text += " ".join([soft or mask] * piece.count)
            else:
                value = literal(_changed(str(values[piece.name]).strip(), piece.change))
                cuts.append(Shorten(len(text), len(text) + len(value), side="right"))
                text += value
        return Prompt(Filled(text), tuple(cuts))


def _slot(inner: str, fields: Sequence[str], where: str) -> Slot:
    name, _, change = inner.partition("!")
    known = [*fields, MASK, SOFT]
    if name == SOFT and re.fullmatch(r"soft(![1-9]\d{0,3})?", inner):
        return Slot(name, change)
    if name not in known:
        raise UserError(f"{where}: no field {{{name}}}{nearest(name, known)}")
    if "!" in inner and (name in (MASK, SOFT) or change not in CHANGES):
        raise UserError(
            f"{where}: {{{inner}}} is no field with a change; there is {{name!drop}} and "
            "{name!lower}"
        )
    return Slot(name, change)


def mask_text(tokenizer: Tokenizer) -> str:
    """What stands at the mask for an encoder with this tokenizer.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    for name in MASK_NAMES:
        text = deliberate(name)
        if tokenizer.mask_id is not None and tokenizer.mask_id in tokenizer.encode(text, False):
            return text
    raise UserError(
        f"the encoder's tokenizer has no mask token ({' or '.join(MASK_NAMES)}), so it cannot be "
        "prompted"
    )


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    length: int,
    names: Sequence[str],
    template: Template | None = None,
    soft: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts for an encoder.

    Args:
      tokenizer: of the encoder.
      prompts: filled with `mask_text`.
      length: of a row in tokens, special ones included.
      names: of the lines the prompts were made of, for messages.
      template: of the prompts; None stands for one without vectors of a trained prompt.
      soft: the ids of these vectors, as many as the template has.

    Returns:
      Tokens int32 [b, length], padded with 0, and the place of each mask, int32 [b].

    Raises:
      UserError: what has to stay whole takes more than `length`; names the line.
    """
    rows = tokenizer.encode_batch([prompt.text for prompt in prompts], True)
    for number, prompt in enumerate(prompts):
        if len(rows[number]) <= length:
            continue
        text = shortened(tokenizer, prompt.text, prompt.cuts, length, add_special=True)
        if text is None:
            raise UserError(
                f"{names[number]}: what has to stay whole of its prompt takes more than {length} "
                "tokens, and the mask is never cut; allow longer texts, or shorten the template"
            )
        rows[number] = tokenizer.encode(text, True)
    tokens_bl = tokenizer.pad_to(rows, length)
    is_mask_bl = tokens_bl == tokenizer.mask_id
    assert (is_mask_bl.sum(axis=1) == 1 + len(soft)).all(), "one mask, and no field has another"
    at = 0 if template is None else template.masked
    order_bl = np.cumsum(is_mask_bl, axis=1)  # marks and mask, from 1
    if soft:
        ids = np.array([*soft[:at], tokenizer.mask_id, *soft[at:]], tokens_bl.dtype)
        tokens_bl = np.where(is_mask_bl, ids[np.maximum(order_bl, 1) - 1], tokens_bl)
    is_mask_bl &= order_bl == at + 1
    return tokens_bl, is_mask_bl.argmax(axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Verbaliser:
    """The words of each label, in the order of the labels.

    Attributes:
      words: label -> its words, one or more.
      binding: where they stand, for messages.
    """

    words: Mapping[Any, tuple[str, ...]]
    binding: str

    @classmethod
    def of(cls, given: Any, labels: Sequence[Any], binding: str) -> "Verbaliser":
        """Check label -> word or list of words.

        Raises:
          UserError: names the binding, and the label that is unknown, absent or without words.
        """
        if not isinstance(given, Mapping):
            raise UserError(f"{binding} = {given!r}: expected a dict of each label's words")
        for label in given:
            if label not in labels:
                near = nearest(str(label), [str(one) for one in labels])
                raise UserError(f"{binding}: the task has no label {label!r}{near}")
        words = {}
        for label in labels:
            if label not in given:
                raise UserError(f"{binding}: the label {label!r} has no word")
            own = given[label]
            own = (own,) if isinstance(own, str) else own
            if not (isinstance(own, Sequence) and own and all(map(_is_word, own))):
                raise UserError(
                    f"{binding}: label {label!r}: expected a word or a list of words, not {own!r}"
                )
            words[label] = tuple(own)
        return cls(words, binding)

    @property
    def first(self) -> dict[Any, str]:
        """The first word of each label, which a reader writes."""
        return {label: words[0] for label, words in self.words.items()}

    def tokens(self, template: Template, tokenizer: Tokenizer) -> "LabelTokens":
        """The words' tokens where the template has its mask.

        Raises:
          UserError: a word is several tokens there, or unknown, or stands for two labels; names
            the binding, the label, the word and its pieces.
        """
        most = max(map(len, self.words.values()))
        ids_cw = np.zeros((len(self.words), most), np.int32)
        weights_cw = np.zeros(ids_cw.shape, np.float32)
        taken: dict[int, str] = {}
        for row, (label, words) in enumerate(self.words.items()):
            for column, word in enumerate(words):
                where = f"{self.binding}: label {label!r}: the word {word!r}"
                token = _one_token(word, template, tokenizer, where)
                if token in taken:
                    raise UserError(f"{where} is the token of {taken[token]}, too")
                taken[token] = f"{word!r} (label {label!r})"
                ids_cw[row, column] = token
                weights_cw[row, column] = 1.0 / len(words)
        return LabelTokens(ids_cw, weights_cw)


@dataclasses.dataclass(frozen=True)
class LabelTokens:
    """The tokens of the labels' words.

    Attributes:
      ids_cw: int32 [c, w]; labels with fewer words have 0 in the rest.
      weights_cw: float32 [c, w]; a label's logit is the sum of its words' logits times these, which
        is their mean.
    """

    ids_cw: np.ndarray
    weights_cw: np.ndarray


def _is_word(word: Any) -> bool:
    return isinstance(word, str) and bool(word.strip())


def _one_token(word: str, template: Template, tokenizer: Tokenizer, where: str) -> int:
    """The word's token in the template's context.

    The texts with the mask and with the word are compared: what differs is the word's. So a blank
    before the mask counts in a byte-level vocabulary, where it belongs to the word's token.
    """
    values = {piece.name: _ANY_TEXT for piece in template.pieces if isinstance(piece, Slot)}
    mask = mask_text(tokenizer)
    masked = tokenizer.encode(template.filled(values, mask).text, True)
    spoken = tokenizer.encode(template.filled(values, literal(word.strip()), mask).text, True)
    at = [i for i, token in enumerate(masked) if token == tokenizer.mask_id][template.masked]
    before = _common(masked[:at], spoken)
    after = _common(masked[at + 1 :][::-1], spoken[before:][::-1])
    own = spoken[before : len(spoken) - after]
    pieces = [tokenizer.decode([token], skip_special=False) for token in own]
    if len(own) != 1:
        raise UserError(
            f"{where} is {len(own)} tokens in {template.text!r} ({', '.join(map(repr, pieces))}); "
            "give a word that is one"
        )
    if own[0] == tokenizer.unk_id:
        raise UserError(f"{where} is not in the vocabulary; give a word that is")
    return own[0]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
