"""BM25 over the demo's passages: word matching, to compare the retriever with."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import bm25s
import numpy as np

# Robertson's parameters; the values of Anserini and Pyserini for passages of this length.
K1 = 0.9
B = 0.4
RECALL_AT = (1, 5, 20)

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every index at DEBUG

_WORD = re.compile(r"\w+")


def singular(word: str) -> str:
    """Strip a plural ending (the S-stemmer of Harman 1991, "How effective is suffixing?")."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def _plain(text: str) -> str:
    return " ".join(singular(word) for word in _WORD.findall(text.lower()))


def _words(texts: Sequence[str]) -> Any:
    return bm25s.tokenize([_plain(t) for t in texts], stopwords="en", show_progress=False)


def search(
    passages: Sequence[Mapping[str, str]], questions: Sequence[str], k: int
) -> list[list[str]]:
    """Return, for each question, the ids of the `k` best passages, best first.

    Title, section name and text of a passage are searched.
    """
    ranker = bm25s.BM25(k1=K1, b=B)
    ranker.index(
        _words([f"{p['title']} {p['section']} {p['text']}" for p in passages]), show_progress=False
    )
    rows, _ = ranker.retrieve(
        _words(questions), k=min(k, len(passages)), show_progress=False, sorted=True
    )
    ids = [p["id"] for p in passages]
    return [[ids[row] for row in np.asarray(found)] for found in rows]


def bm25_recall(
    passages: Sequence[Mapping[str, str]],
    questions: Sequence[Mapping[str, Any]],
    at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Return `recall@k` in percent: how many questions find a gold passage among the first k."""
    found = search(passages, [q["question"] for q in questions], max(at))
    return {
        f"recall@{k}": 100.0
        * sum(
            not set(q["gold"]).isdisjoint(ids[:k]) for q, ids in zip(questions, found, strict=True)
        )
        / max(len(questions), 1)
        for k in at
    }
