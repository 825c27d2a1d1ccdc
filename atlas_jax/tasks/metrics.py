"""Scores of an answer and of a list of passages: pure functions on text.

Answers are compared as in SQuAD: lower-cased, without ASCII punctuation and articles, with single
blanks. Every score is between 0 and 1.
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from rapidrouge import RougeScorer

from atlas_jax.tasks.words import tokens, words

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The form in which two answers are compared (SQuAD 1.1 evaluation script)."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both normalise to the same text, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """F1 of the normalised words as multisets; 1.0 if both have none, 0.0 if one has.

    If both have none, SQuAD 1.1's script gives 0.0 (with an exact match of 1.0), SQuAD 2.0's 1.0.
    Otherwise all three agree.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * common / (len(predicted) + len(expected))


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(name: str, prediction: str, answer: str) -> float:
    """F-measure of `name`, one of ROUGE, without stemming.

    The numbers are those of Google's `rouge_score`: words are lower-cased runs of ASCII letters and
    digits. It sees no words in other letters. If a text has such letters, the words of
    `tasks/words.py` are used.
    """
    scorer = _rouge_scorer(name, _has_other_letters(prediction) or _has_other_letters(answer))
    return float(scorer.score(answer, prediction)[name].fmeasure)


def ndcg_at_k(found_ids: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Normalised discounted cumulative gain of the first k, as trec_eval's `ndcg_cut`.

    The gain is the grade itself and the discount is log2(rank + 1). Passages without a grade or
    with one below 0 gain nothing. 0.0 if nothing is relevant.
    """

    def gain(sequence: Sequence[float]) -> float:
        return sum(
            max(grade, 0.0) / math.log2(rank + 1) for rank, grade in enumerate(sequence[:k], 1)
        )

    ideal = gain(sorted(grades.values(), reverse=True))
    return gain([grades.get(found, 0.0) for found in found_ids]) / ideal if ideal > 0 else 0.0


def share_found_at_k(found_ids: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Share of the relevant passages (grade above 0) that are among the first k; 0.0 if none is."""
    relevant = {found for found, grade in grades.items() if grade > 0}
    return len(relevant.intersection(found_ids[:k])) / len(relevant) if relevant else 0.0


def best_over_answers(
    score: Callable[[str, str], float], prediction: str, answers: Sequence[str]
) -> float:
    """The best score against several accepted answers.

    Raises:
      ValueError: there are no answers.
    """
    return max(score(prediction, answer) for answer in answers)


def recall_at_k(found_ids: Sequence[str], gold_ids: Collection[str], k: int) -> float:
    """1.0 if any of the first k found passages is a gold passage, else 0.0."""
    return float(any(found in gold_ids for found in found_ids[:k]))


def answer_in_passage(passage: str, answers: Sequence[str]) -> bool:
    """Whether the passage contains the tokens of an answer in a row (`tasks/words.py`).

    An answer without a letter or digit is never found.
    """
    row = _joined(passage)
    return any(bool(words(answer)) and f" {' '.join(tokens(answer))} " in row for answer in answers)


def answer_recall_at_k(passages: Sequence[str], answers: Sequence[str], k: int) -> float:
    """1.0 if any of the first k passages has an answer in it, else 0.0."""
    return float(any(answer_in_passage(passage, answers) for passage in passages[:k]))


class _UnicodeWords:
    """A tokenizer for RougeScorer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge_scorer(name: str, other_letters: bool) -> RougeScorer:
    tokenizer = _UnicodeWords() if other_letters else None
    return RougeScorer([name], use_stemmer=False, tokenizer=tokenizer)


def _has_other_letters(text: str) -> bool:
    return not text.isascii() and any(one.isalnum() and not one.isascii() for one in text)


@functools.lru_cache(maxsize=1 << 14)
def _joined(text: str) -> str:
    # The same passages are found for many questions.
    return f" {' '.join(tokens(text))} "
