"""What `prepare` does with passages between reading and writing: functions of one passage each.

One machine (`convert`) and a Beam pipeline (`beam_pipeline`) call the same functions in the same
order: clean, take out leaks, then take out duplicates. So both write the same lines.
"""

import array
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from atlas_jax.core import bounds
from atlas_jax.core.jsonl import JsonObject

# A line of the report on a passage that leaks; None for one that does not.
LeakTest = Callable[[JsonObject], JsonObject | None]
Rank = tuple[int, str, str]  # length of the id, id, line

_TEXTS = ("title", "section", "text")
_UNSEEN = re.compile("[\u00ad\u200b\ufeff]")  # soft hyphen, blank without width, byte order mark


@dataclasses.dataclass(frozen=True)
class PassagesConfig:
    """What `prepare` changes in a corpus. By default passages stay as they were published.

    Attributes:
      clean: title, section and text get Unicode's composed form (NFC). Each run of white space
        becomes one blank. Control characters, soft hyphens, blanks without width and byte order
        marks are left out.
      min_words: passages with fewer words are left out.
      deduplicate: of several passages with the same title and text one stays: that with the
        shortest id, and of equally long ids the first in the order of their characters (so of
        numbers the smallest). Letter case and white space do not count.
    """

    clean: bool = False
    min_words: bounds.AtLeast0 = 0
    deduplicate: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        bounds.check(self)


@dataclasses.dataclass(frozen=True)
class PassageRules:
    """A `PassagesConfig`, and the test that finds passages which leak.

    Attributes:
      leak: None for no such test. A pipeline pickles it for its workers.
      leak_rule: what the test looks for, for the notes on what was written.
    """

    config: PassagesConfig = PassagesConfig()
    leak: LeakTest | None = None
    leak_rule: str = ""

    def told(self) -> dict[str, Any]:
        """All that decides what is written, for prepared.json; {} if nothing is changed."""
        told = {name: v for name, v in dataclasses.asdict(self.config).items() if v}
        return told | ({"leaks": self.leak_rule} if self.leak else {})

    def apply(self, row: JsonObject) -> tuple[JsonObject | None, JsonObject | None]:
        """The passage as it is written, or None; and its line of the report if it leaks."""
        kept = cleaned(row, self.config)
        report = self.leak(kept) if kept is not None and self.leak is not None else None
        return (None if report else kept), report


AS_PUBLISHED = PassageRules()


def cleaned(row: JsonObject, config: PassagesConfig) -> JsonObject | None:
    """The passage cleaned as the config says; None if it has too few words."""
    if config.clean:
        row = {k: _clean_text(v) if k in _TEXTS else v for k, v in row.items()}
    words = len(row["text"].split()) if config.clean or config.min_words else 1
    return row if words >= max(config.min_words, 1) else None


def _clean_text(text: str) -> str:
    text = _UNSEEN.sub("", unicodedata.normalize("NFC", text))
    if not text.isprintable():
        text = "".join(s for s in text if s.isspace() or unicodedata.category(s) != "Cc")
    return " ".join(text.split())


def as_line(row: JsonObject) -> str:
    """The passage as a line of jsonl, without the line's end."""
    return json.dumps(row, ensure_ascii=False)


def digest(row: JsonObject) -> bytes:
    """16 bytes that duplicates share: the BLAKE2 hash of title and text."""
    both = (" ".join((row.get(name) or "").split()).casefold() for name in ("title", "text"))
    return hashlib.blake2b("\0".join(both).encode("utf-8"), digest_size=16).digest()


def rank(row: JsonObject, line: str) -> Rank:
    """Orders duplicates: the smallest one stays. The line decides between equal ids."""
    return len(str(row["id"])), str(row["id"]), line


def without_duplicates(lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The lines of passages of which each (title, text) stays once, in their order.

    Holds 16 bytes a passage in memory, and those lines of which there are several.

    Args:
      lines: gives all lines each time that it is called; it is called two or three times.
    """
    digests = array.array("Q")
    for line in lines():
        digests.frombytes(digest(json.loads(line)))
    repeated = _repeated(np.frombuffer(digests, np.uint64).reshape(-1, 2))
    first = dict[bytes, Rank]()
    for line, found in _digested(lines, repeated):
        if found is not None:
            ranked = rank(json.loads(line), line)
            first[found] = min(first.get(found, ranked), ranked)
    for line, found in _digested(lines, repeated):
        if found is None:
            yield line
        elif found in first and first[found][2] == line:
            del first[found]  # a line that is there twice stays once, too
            yield line


def _digested(
    lines: Callable[[], Iterable[str]], repeated: frozenset[bytes]
) -> Iterator[tuple[str, bytes | None]]:
    """Each line with its digest, or with None if no other passage has it."""
    for line in lines():
        found = digest(json.loads(line)) if repeated else None
        yield line, found if found in repeated else None


def _repeated(digests_n2: np.ndarray) -> frozenset[bytes]:
    """The digests (two numbers each) that occur more than once."""
    ordered_n2 = digests_n2[np.lexsort(digests_n2.T)]
    same_n = (ordered_n2[1:] == ordered_n2[:-1]).all(axis=1)
    return frozenset(row.tobytes() for row in ordered_n2[1:][same_n])
