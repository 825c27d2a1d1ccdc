"""The facts of a text of the form `Field: subfield: value; subfield: value. Field: value.`

Reference works, infoboxes and tables written out as text have this form. A fact is a
label and the stretch of text that is its value.
"""

import dataclasses
import re

# A field begins the text or a sentence, has a capital and ends with a colon.
_FIELD = re.compile(r"(?:^|(?<=[.;] ))([A-Z][^:;.]{1,70}): (?=\S)")
_PART = re.compile(r"; ")
# The value's head: what stands before a remark, a list's next entry or the end.
_HEAD = re.compile(r"[^;(]*?(?=,? \(|, |; | - |\. |[.;]?$| -?[\d.,]+%)")
_MAX_LABEL_WORDS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """`text[start:end]` is the value of `label` (field and subfields, joined by blanks)."""

    label: str
    start: int
    end: int

    def value(self, text: str) -> str:
        """The value as it stands in the text."""
        return text[self.start : self.end]


def find_facts(text: str, max_words: int) -> tuple[Fact, ...]:
    """All facts of a text whose value has at most `max_words` words and whose label is unique.

    A field may have several parts, `Field: subfield: value; subfield: value`; only the
    head of a value counts, up to a bracket, a comma or a percentage.
    """
    fields = list(_FIELD.finditer(text))
    found: list[Fact] = []
    for number, field in enumerate(fields):
        end = fields[number + 1].start() if number + 1 < len(fields) else len(text)
        at = field.end()
        for part in _PART.split(text[at:end]):
            subfields, _, value = part.rpartition(": ")
            start = at + len(part) - len(value)
            at += len(part) + len("; ")
            head = _HEAD.match(value)
            size = len(head.group().rstrip()) if head else 0
            label = " ".join([field.group(1), *subfields.split(": ")]).strip()
            if size and len(label.split()) <= _MAX_LABEL_WORDS:
                found.append(Fact(label, start, start + size))
    labels = [fact.label for fact in found]
    return tuple(
        fact
        for fact in found
        if labels.count(fact.label) == 1 and len(fact.value(text).split()) <= max_words
    )
