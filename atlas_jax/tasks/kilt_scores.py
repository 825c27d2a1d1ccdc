"""How KILT's own script scores an answer, to the last digit (its `kilt/eval_downstream.py`).

Its exact match is SQuAD's, see `metrics`; the rest differs from what the other tasks report. An
empty answer scores 0 there, whatever is asked for: that is left to the caller.
"""

from collections.abc import Sequence

from atlas_jax.tasks import metrics

_TINY = 1e-8  # what the script adds to a denominator, even where it is not zero


def accuracy(prediction: str, answer: str) -> float:
    """1.0 if both are the same text as they stand, case and all, else 0.0."""
    return float(prediction == answer)


def f1(prediction: str, answer: str) -> float:
    """F1 of the normalised words, but 0.0 where neither has any."""
    return metrics.f1(prediction, answer) if metrics.normalize_answer(answer) else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the texts as they stand, neither lower-cased nor stripped of punctuation.

    As the package `rouge` 1.0.1 has it, which the script takes: texts are cut into sentences at
    each full stop, these into words at blanks; words count once, as sets. With `u` the words in
    the longest common subsequences of any two sentences, F = 2 P R / (P + R) of P = u / words of
    the prediction and R = u / words of the answer. A text of full stops alone scores 0.0.
    """
    predicted, expected = _sentences(prediction), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    for sentence in expected:
        for other in predicted:
            common.update(_common_words(sentence, other))
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2.0 * precision * recall / (precision + recall + _TINY)


def _sentences(text: str) -> list[list[str]]:
    """The words of each; a sentence of blanks alone has one word, which is empty."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package takes."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, against in enumerate(other):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if word == against else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(one[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
