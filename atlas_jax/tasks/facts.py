"""The facts of a text of the form `Field: subfield: value; subfield: value. Field: value.`

Reference works, infoboxes and tables have this form when they are written as text. A fact is a
label and the part of the text that is its value.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

# A field begins the text or a sentence, has a capital and ends with a colon.
_FIELD = re.compile(r"(?:^|(?<=[.;] ))([A-Z][^:;.]{1,70}): (?=\S)")
_PART = re.compile(r"; ")
# In brackets right after a value's head: a name, `(PGK)`, or the text after a word of more than
# three small letters, `(since 9 January 2025)`, `(from the UK)`; but not `(2023 est.)`.
_REMARK = re.compile(
    r" \((?:(?P<cue>[a-z]{4,}) (?:the )?(?=[A-Z\d])|(?=[A-Z]))(?P<value>[^(),;]+?)(?=[),])"
)
# A full stop at an end: not after an initial ("Wesley W. SIMINA", "B.C. ") or a title.
_STOP = r"\. (?<!\b[A-Z]\. )(?<!\b(?:Dr|Ft|Jr|Lt|Mr|Mt|Sr|St)\. )(?<!\b(?:Col|Gen|Maj|Mrs|Ste)\. )"
# The value's head ends before a remark, the next entry of a list, a percentage or the end. Brackets
# that form a plural, `Islander(s)`, belong to their word.
_HEAD = re.compile(
    rf"(?:[^;(]|(?<=\w)\(_{{1,3}}\))*?(?=[ ,.;]|$)(?=,? \(|, |; | - | -?[\d.,]+%|[.;]? ?$|{_STOP})"
)
_END = re.compile(r"[.; ]+$")
_MAX_LABEL_WORDS = 12
_MAX_LIST_WORDS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """`text[start:end]` is the value of `label` (field and subfields, joined by blanks).

    `text[start:stop]` is the value with all text up to a semicolon: remarks and the other entries
    of a list with commas. If this is long, `stop` is `end`.
    """

    label: str
    start: int
    end: int
    stop: int

    def value(self, text: str) -> str:
        """The value as it is in the text."""
        return text[self.start : self.end]

    def whole(self, text: str) -> str:
        """The value with the text after its head."""
        return text[self.start : self.stop]


def find_facts(text: str) -> tuple[Fact, ...]:
    """All facts of a text from left to right.

    A field may have several parts, `Field: subfield: value; subfield: value`. Of a value only the
    head counts, up to a bracket, a comma or a percentage. A colon or semicolon in brackets
    separates nothing. A later part without a subfield is not a fact: it continues the list before
    it. In the brackets right after a head, a name is a fact of its own; so is the text after a word
    like `since`. Its label ends with this word or the bracket.
    """
    bare = _without_remarks(text)
    fields = list(_FIELD.finditer(bare))
    found: list[Fact] = []
    for number, field in enumerate(fields):
        end = fields[number + 1].start() if number + 1 < len(fields) else len(text)
        at = field.end()
        for part in _PART.split(bare[at:end]):
            subfields, colon, value = part.rpartition(": ")
            start = at + len(subfields) + len(colon)
            if colon or at == field.end():
                label = f"{text[field.start(1) : field.end(1)]} {text[at : at + len(subfields)]}"
                found += _facts_of(label.replace(": ", " ").strip(), value, text, start)
            at += len(part) + len("; ")
    return tuple(found)


def _facts_of(label: str, value: str, text: str, start: int) -> list[Fact]:
    """The facts of a part: its value and its remark. In `value` the brackets are empty."""
    head = _HEAD.match(value)
    end = start + (len(head.group().rstrip()) if head else 0)
    if end == start or len(label.split()) > _MAX_LABEL_WORDS:
        return []
    stop = start + len(_END.sub("", value))
    if len(text[start:stop].split()) > _MAX_LIST_WORDS:
        stop = end
    found = [Fact(label, start, end, max(end, stop))]
    remark = _REMARK.match(text, end)
    if remark and len(label.split()) < _MAX_LABEL_WORDS:
        first, last = remark.span("value")
        found.append(Fact(f"{label} {remark['cue'] or '('}", first, last, last))
    return found


def askable(facts: Sequence[Fact], text: str, max_words: int) -> tuple[Fact, ...]:
    """The facts of a text that have a unique label and a short value.

    Args:
      facts: all facts of the text.
      text: the text.
      max_words: longer values are left out.
    """
    times = collections.Counter(fact.label for fact in facts)
    return tuple(
        fact
        for fact in facts
        if times[fact.label] == 1 and len(fact.value(text).split()) <= max_words
    )


def _without_remarks(text: str) -> str:
    """The text with underscores in place of all characters in brackets; of the same length."""
    pieces = list(text)
    opened: list[int] = []
    for bracket in re.finditer(r"[()]", text):
        if bracket.group() == "(":
            opened.append(bracket.end())
        elif opened:
            start = opened.pop()
            pieces[start : bracket.start()] = "_" * (bracket.start() - start)
    return "".join(pieces)
