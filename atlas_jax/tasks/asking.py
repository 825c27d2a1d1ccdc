"""Questions as patterns: a question about one title is asked about other titles too.

The answer to a question follows a label in a passage of its title (`Which city is the capital of
Peru?`, `Capital name: Lima`). If another passage has this label, the same words ask for the value
there. So a few questions give one question for each such value of the corpus. Their wordings are
still only those of the few.

Nobody says which passage that is: question and answer alone tell it, with the passages of the title
that the question names.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import STRICT, FieldTypes, RowsConfig
from atlas_jax.tasks.base import Record, load_records
from atlas_jax.tasks.fact_corpus import FactCorpus, FactPassage
from atlas_jax.tasks.facts import Fact
from atlas_jax.tasks.metrics import normalize_answer

_DIGITS = re.compile(r"\d[\d.,]*")
_MARKS = "\"'“”‘’«»,;"
_OFTEN = 0.05  # a first word of more than this share of a label's values is a role, not a name
_LOOKED_AT = 10_000  # values of a label, to tell which words stand beside its answers
_RARE = 0.1  # words beside an answer that fewer of a label's values have are no pattern


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """A question without its title, and the part of a label's value that answers it.

    Words are compared by their form: in small letters, with `#` for a number.

    Attributes:
      before, after: the words around the title.
      left, right: forms of the value's words on either side of the answer (after a mountain's
        name, `1,050 m`: `#`, `m`). Both empty: the whole value is the answer.
      measure: shapes of the answer's words if it is a part with a number (`1,050 m` after the
        name): `#` for a number, `A` for a word with a capital, else the word itself.
      from_list: whether the answer is also searched in the text after the value's head.
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
    path: str, corpus: FactCorpus, rows: RowsConfig = STRICT
) -> dict[str, tuple[Pattern, ...]]:
    """The patterns of a file of questions, by the label that each asks for.

    Some questions are left out: those that name no title of the passages, and those whose answer is
    neither a value of a passage of this title nor a part of one.

    Args:
      path: lines `{question, answers}`.
      corpus: passages with facts.
      rows: what happens to a broken line.

    Raises:
      UserError: a bad line; no question of the file can be asked of other titles.
    """
    optional: FieldTypes = {"answers": list}
    records = load_records(path, {"question": str}, optional, ["question"], rows=rows)
    found: dict[str, list[Pattern]] = {}
    for record in records:
        title = _title(record.fields["question"], corpus.has_title)
        sources = [corpus.sources[row] for row in corpus.of_title(title)] if title else []
        likeliest = _likeliest(record, title, sources) if title else None
        if likeliest is not None:
            label, pattern = likeliest
            found.setdefault(label, []).append(_general(pattern, _some(corpus.facts(label))))
    if not found:
        raise UserError(
            f"{path}: no question can be asked of other titles. One can that names a title of the "
            "passages, and whose answer is a value of a passage of this title"
        )
    return {label: tuple(dict.fromkeys(patterns)) for label, patterns in found.items()}


def _some(facts: Sequence[tuple[Fact, str]]) -> list[tuple[Fact, str]]:
    """All facts of a label, or as many as are looked at, from all over the file."""
    step = -(-len(facts) // _LOOKED_AT) or 1
    return [facts[at] for at in range(0, len(facts), step)]


def _title(question: str, is_title: Callable[[str], bool]) -> str:
    """The longest title in a question, between whole words; "" for none."""
    inner = (i for i in range(1, len(question)) if not question[i - 1 : i + 1].isalnum())
    ends = [0, *inner, len(question)]
    named = (question[i:j] for i, j in itertools.combinations(ends, 2))
    return max((part for part in named if is_title(part)), key=len, default="")


def _general(pattern: Pattern, facts: Sequence[tuple[Fact, str]]) -> Pattern:
    """Generalise a pattern from one value of a label to all its values.

    If a word stands left of the answer, all words that begin many values may stand there: they are
    roles too (`President`, `Prime Minister`). Words beside the answer that hardly any other value
    has belong to this one value. Then the whole value is the answer.
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


def _likeliest(
    record: Record, title: str, sources: Sequence[FactPassage]
) -> tuple[str, Pattern] | None:
    """Label and pattern; of several labels whose value has the answer, the likeliest.

    The likeliest has the fewest words beside the answer, then the most words of the question. If
    the answer is only a part of the value, the label must share a word with the question. The text
    after a value's head counts if the head does not have the answer: as a whole, or a part with a
    number.
    """
    before, _, after = record.fields["question"].partition(title)
    asked = _stems(before + after)
    found: list[tuple[tuple[int, int], str, Pattern]] = []
    answers = [str(answer) for answer in record.fields.get("answers") or ()]
    for source, answer in itertools.product(sources, answers):
        for fact in source.facts:
            shared = len(asked & _stems(fact.label))
            for from_list in (False, True):
                value = fact.whole(source.text) if from_list else fact.value(source.text)
                parts = _parts(answer, value)
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
    """The value's words before the answer, in it and after it; None if it is not in the value."""
    words, wanted = value.split(), normalize_answer(answer)
    for size in range(len(words), 0, -1):
        for first in range(len(words) - size + 1):
            last = first + size
            if normalize_answer(" ".join(words[first:last])) == wanted:
                return words[:first], words[first:last], words[last:]
    return None


def _stems(text: str) -> set[str]:
    """The first five letters of each word that has at least four."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())}


def _form(word: str) -> str:
    """A word's form in `Pattern.left` and `right`."""
    return _DIGITS.sub("#", word.lower())


def _shape(word: str) -> str:
    """A word's shape in `Pattern.measure`."""
    return "A" if word[:1].isupper() else _form(word.strip(_MARKS))
