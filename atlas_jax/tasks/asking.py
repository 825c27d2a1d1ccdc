"""Questions as patterns: what is asked about one title is asked about another.

A question's answer stands in its passage behind a label (`Which city is the capital of Peru?`,
`Capital name: Lima`). Wherever another passage has that label, the same words ask for the value
there. So a handful of questions becomes as many as the corpus has values, and no more wordings
than the handful has.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks.base import Record, load_records
from atlas_jax.tasks.fact_corpus import FactPassage
from atlas_jax.tasks.facts import Fact
from atlas_jax.tasks.metrics import normalize_answer

_DIGITS = re.compile(r"\d[\d.,]*")
_MARKS = "\"'“”‘’«»,;"
_OFTEN = 0.05  # of a label's values begin with a word that is a role, not a name
_RARE = 0.1  # of a label's values have what stands beside the answer of a pattern


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """A question without its title, and which part of a label's value answers it.

    Words are compared by their form: in small letters, a number as `#`.

    Attributes:
      before, after: what stands around the title.
      left, right: forms of the words that the value has on either side of the answer (behind a
        mountain's name `1,050 m`: `#`, `m`). Both empty: the whole value answers.
      measure: shapes of the answer's words, where it is a part with a number (`1,050 m` behind the
        name): a number `#`, a word with a capital `A`, else the word itself.
      from_list: the answer is looked for in all that follows the value's head, too.
    """

    before: str
    after: str
    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()
    measure: tuple[str, ...] = ()
    from_list: bool = False

    def question(self, title: str) -> str:
        """The question about this title."""
        return f"{self.before}{title}{self.after}"

    def answer(self, fact: Fact, text: str) -> str | None:
        """The part of a fact's value that answers, without quotes; None if it has another form."""
        words = (fact.whole(text) if self.from_list else fact.value(text)).split()
        part = self._measured(words) if self.measure else self._between(words)
        return " ".join(words[part]).strip(_MARKS) or None

    def _between(self, words: Sequence[str]) -> slice:
        first, last = 0, len(words)
        while first < last and _form(words[first]) in self.left:
            first += 1
        while last > first and _form(words[last - 1]) in self.right:
            last -= 1
        cut = (not self.left or first > 0) and (not self.right or last < len(words))
        return slice(first, last if cut else first)

    def _measured(self, words: Sequence[str]) -> slice:
        shapes, size = tuple(map(_shape, words)), len(self.measure)
        for first in range(len(words) - size + 1):
            if shapes[first : first + size] == self.measure:
                return slice(first, first + size)
        return slice(0, 0)


def load_patterns(
    path: str, sources: Mapping[str, FactPassage], rows: RowsConfig = STRICT
) -> dict[str, tuple[Pattern, ...]]:
    """The patterns of a file of questions, by the label that each asks for.

    Questions are left out that do not name the title of their passage, or whose answer is not
    (the beginning, the end or the middle of) one value of it.

    Args:
      path: lines `{question, answers, gold}`.
      sources: passages with facts, by id.
      rows: what becomes of a broken line.

    Raises:
      UserError: a bad line; no question of the file can be asked of other titles.
    """
    optional: FieldTypes = {"answers": list}
    records = load_records(path, {"question": str}, optional, ["question"], rows=rows)
    found: dict[str, list[Pattern]] = {}
    facts = _by_label(sources.values())
    for record in records:
        for gold in record.gold_ids:
            made = _pattern(record, sources[gold]) if gold in sources else None
            if made is not None:
                label, pattern = made
                found.setdefault(label, []).append(_general(pattern, facts[label]))
                break
    if not found:
        raise UserError(
            f"{path}: no question can be asked of other titles. One can that names the title of "
            "its passage (field 'gold', an id of the passages) and is answered by a value of it"
        )
    return {label: tuple(dict.fromkeys(patterns)) for label, patterns in found.items()}


def _by_label(sources: Iterable[FactPassage]) -> dict[str, list[tuple[Fact, str]]]:
    """The facts of all passages, each with its text, by label."""
    facts: dict[str, list[tuple[Fact, str]]] = collections.defaultdict(list)
    for source in sources:
        for fact in source.facts:
            facts[fact.label].append((fact, source.text))
    return facts


def _general(pattern: Pattern, facts: Sequence[tuple[Fact, str]]) -> Pattern:
    """The pattern for all values of its label, of which one question has shown one.

    With a word left of the answer go all words that many of the values begin with, for these are
    roles, too (`President`, `Prime Minister`). What hardly a value has beside the answer was of
    that one value: then the whole value answers.
    """
    if pattern.left:
        roles = pattern.left | _beginnings([fact.value(text) for fact, text in facts])
        pattern = dataclasses.replace(pattern, left=roles)
    fitting = sum(pattern.answer(fact, text) is not None for fact, text in facts)
    if fitting < _RARE * len(facts):
        return Pattern(pattern.before, pattern.after)
    return pattern


def _beginnings(values: Sequence[str]) -> frozenset[str]:
    """Forms of words before the last that at least `_OFTEN` of the distinct values begin with."""
    distinct = set(values)
    times = collections.Counter(
        form for value in distinct for form in {_form(word) for word in value.split()[:-1][:2]}
    )
    return frozenset(form for form, n in times.items() if n >= max(3, _OFTEN * len(distinct)))


def _pattern(record: Record, source: FactPassage) -> tuple[str, Pattern] | None:
    """Label and pattern; of several labels whose value has the answer, the likeliest.

    That is the one with the fewest words beside the answer, then the one with most words of the
    question. Of a value that is not the answer as a whole, the label has to have one of them. What
    follows a value's head counts where the head has no answer: as a whole, or a part with a number.
    """
    question = record.fields["question"]
    before, title, after = question.partition(source.title)
    if not title:
        return None
    found: list[tuple[tuple[int, int], str, Pattern]] = []
    asked = _stems(before + after)
    for answer in record.fields.get("answers") or ():
        for fact in source.facts:
            shared = len(asked & _stems(fact.label))
            for from_list in (False, True):
                value = fact.whole(source.text) if from_list else fact.value(source.text)
                parts = _parts(str(answer), value)
                if parts is None:
                    continue
                left, own, right = parts
                beside = len(left) + len(right)
                measure = tuple(map(_shape, own)) if beside else ()
                measure = measure if "#" in measure else ()
                if beside == 0 or (shared and (measure or not from_list)):
                    sides = frozenset(map(_form, left)), frozenset(map(_form, right))
                    pattern = Pattern(before, after, *sides, measure, from_list)
                    found.append(((beside, -shared), fact.label, pattern))
                break
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


def _shape(word: str) -> str:
    """A word as the measure of a pattern has it."""
    return "A" if word[:1].isupper() else _form(word.strip(_MARKS))
