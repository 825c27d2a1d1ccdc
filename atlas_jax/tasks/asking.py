"""Questions as patterns: what is asked about one title is asked about another.

A question's answer stands in its passage behind a label (`Which city is the capital of Peru?`,
`Capital name: Lima`). Wherever another passage has that label, the same words ask for the value
there. So a handful of questions becomes as many as the corpus has values, and no more wordings
than the handful has.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import FieldTypes
from atlas_jax.tasks.base import Record, load_records
from atlas_jax.tasks.fact_corpus import Source
from atlas_jax.tasks.metrics import normalize_answer

_DIGITS = re.compile(r"\d[\d.,]*")
_QUOTES = "\"'“”‘’«»"


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """A question without its title, and which part of a label's value answers it.

    Words are compared by their form: in small letters, a number as `#`.

    Attributes:
      before, after: what stands around the title.
      left, right: forms of the words that the value has on either side of the answer (behind a
        mountain's name `1,050 m`: `#`, `m`). Both empty: the whole value answers.
      measure: forms of the answer, where it is a part with a number (`1,050 m` behind the name).
    """

    before: str
    after: str
    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()
    measure: tuple[str, ...] = ()

    def question(self, title: str) -> str:
        """The question about this title."""
        return f"{self.before}{title}{self.after}"

    def answer(self, value: str) -> str | None:
        """The part of a value that answers, without quotes; None if the value has another form."""
        words = value.split()
        part = self._measured(words) if self.measure else self._between(words)
        return " ".join(words[part]).strip(_QUOTES) or None

    def _between(self, words: Sequence[str]) -> slice:
        first, last = 0, len(words)
        while first < last and _form(words[first]) in self.left:
            first += 1
        while last > first and _form(words[last - 1]) in self.right:
            last -= 1
        cut = (not self.left or first > 0) and (not self.right or last < len(words))
        return slice(first, last if cut else first)

    def _measured(self, words: Sequence[str]) -> slice:
        forms, size = tuple(map(_form, words)), len(self.measure)
        for first in range(len(words) - size + 1):
            if forms[first : first + size] == self.measure:
                return slice(first, first + size)
        return slice(0, 0)


def load_patterns(path: str, sources: Mapping[str, Source]) -> dict[str, tuple[Pattern, ...]]:
    """The patterns of a file of questions, by the label that each asks for.

    Questions are left out that do not name the title of their passage, or whose answer is not
    (the beginning, the end or the middle of) one value of it.

    Args:
      path: lines `{question, answers, gold}`.
      sources: passages with facts, by id.

    Raises:
      UserError: a bad line; no question of the file can be asked of other titles.
    """
    optional: FieldTypes = {"answers": list}
    records = load_records(path, {"question": str}, optional, ["question"])
    found: dict[str, list[Pattern]] = {}
    for record in records:
        for gold in record.gold_ids:
            made = _pattern(record, sources[gold]) if gold in sources else None
            if made is not None:
                label, pattern = made
                found.setdefault(label, []).append(pattern)
                break
    if not found:
        raise UserError(
            f"{path}: no question can be asked of other titles. One can that names the title of "
            "its passage (field 'gold', an id of the passages) and is answered by a value of it"
        )
    return {label: tuple(dict.fromkeys(patterns)) for label, patterns in found.items()}


def _pattern(record: Record, source: Source) -> tuple[str, Pattern] | None:
    """Label and pattern; of several labels whose value has the answer, the likeliest.

    That is the one with the fewest words beside the answer, then the one with most words of the
    question. Of a value that is not the answer as a whole, the label has to have one of them.
    """
    question = record.fields["question"]
    before, title, after = question.partition(source.title)
    if not title:
        return None
    found: list[tuple[tuple[int, int], str, Pattern]] = []
    for answer in record.fields.get("answers") or ():
        for fact in source.facts:
            parts = _parts(str(answer), fact.value(source.text))
            if parts is None:
                continue
            left, own, right = (tuple(map(_form, words)) for words in parts)
            beside = len(left) + len(right)
            shared = len(_stems(before + after) & _stems(fact.label))
            if beside == 0 or shared:
                measure = own if beside and "#" in own else ()
                pattern = Pattern(before, after, frozenset(left), frozenset(right), measure)
                found.append(((beside, -shared), fact.label, pattern))
    if not found:
        return None
    _, label, pattern = min(found, key=lambda one: one[0])
    return label, pattern


def _parts(answer: str, value: str) -> tuple[Sequence[str], Sequence[str], Sequence[str]] | None:
    """The value's words before the answer, in it and behind it; None if it does not hold it."""
    words, wanted = value.split(), normalize_answer(answer)
    for size in range(len(words), 0, -1):
        for first in range(len(words) - size + 1):
            last = first + size
            if normalize_answer(" ".join(words[first:last])) == wanted:
                return words[:first], words[first:last], words[last:]
    return None


def _stems(text: str) -> set[str]:
    """The first five letters of the words of four and more."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())}


def _form(word: str) -> str:
    """A word as the sides of a pattern have it."""
    return _DIGITS.sub("#", word.lower())
