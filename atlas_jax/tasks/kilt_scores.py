"""The scores of KILT's own script (`kilt/eval_downstream.py`), equal to the last digit.

Its exact match is SQuAD's, see `metrics`; its other scores differ from those of the other tasks. In
the script an empty answer always scores 0; here the caller does this.
"""

from collections.abc import Sequence

from atlas_jax.tasks import metrics

_TINY = 1e-8  # the script always adds this to a denominator


def accuracy(prediction: str, answer: str) -> float:
    """1.0 if both texts are equal in every character, else 0.0."""
    return float(prediction == answer)


def f1(prediction: str, answer: str) -> float:
    """F1 of the normalised words, but 0.0 if neither text has a word."""
    return metrics.f1(prediction, answer) if metrics.normalize_answer(answer) else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the texts as they are, with case and punctuation.

    As in the package `rouge` 1.0.1, which the script uses. Texts are cut into sentences at each
    full stop, and sentences into words at blanks. Words count once, as sets. Let u be the number of
    words in the longest common subsequences of any two sentences. With P = u / words of the
    prediction and R = u / words of the answer, F = 2 P R / (P + R). A text of only full stops
    scores 0.0.
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
    """The words of each sentence; a sentence of only blanks has one empty word."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package chooses."""
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
