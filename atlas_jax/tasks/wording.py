"""How a cloze query is worded: a label as it stands, or disturbed as a question would be.

Who asks uses some of a label's words, in an order of his own and among words that the
label lacks. A reader that has met such queries in pretraining finds the label that shares
most words with a question, whatever the rest of the question is; where several do, the first
of them, which says what its field is about (`Capital: name: ..; time difference: ..`).
"""

from collections.abc import Collection, Sequence

import numpy as np

_SIGNS = ("?", ".", ",", "'s")


def disturbed(
    label: str,
    before: Collection[str],
    words: Sequence[str],
    vocabulary: Sequence[str],
    rng: np.random.Generator,
) -> list[str]:
    """Some of a label's words in some order, among words that have nothing to do with it.

    Args:
      label: what is asked for.
      before: the labels that stand before it in its passage; it must not be taken for them.
      words: of running text, drawn from as often as they stand there: mostly small ones.
      vocabulary: the same, each once: rare words are met too, and known for what they are.
      rng: where the choice comes from.

    Returns:
      The words. What is kept of the label stands in none of those before it, unless the whole
      label does.
    """
    own = label.split()
    kept = _kept(own, before, rng)
    if rng.random() < 0.5:
        rng.shuffle(kept)
    asked = [own[i] for i in kept]
    for _ in range(int(rng.integers(0, 8))):
        asked.insert(int(rng.integers(len(asked) + 1)), _noise_word(words, vocabulary, rng))
    return asked


def reworded(
    words: Sequence[str],
    common: Sequence[str],
    vocabulary: Sequence[str],
    rng: np.random.Generator,
) -> list[str]:
    """The words of a question, up to half of them missing, with up to two others among them.

    A question asked in other words mostly shares some with this one; who has met this one with
    gaps goes by the words that are left.

    Args:
      words: those of the question, without its title.
      common, vocabulary: of running text, as in `disturbed`.
      rng: where the choice comes from.
    """
    lost = rng.random() * 0.5
    kept = [word for word in words if rng.random() >= lost] or list(words)
    for _ in range(int(rng.integers(0, 3))):
        kept.insert(int(rng.integers(len(kept) + 1)), _noise_word(common, vocabulary, rng))
    return kept


def around(words: Sequence[str], title: str, rng: np.random.Generator) -> list[str]:
    """The words with the title among them: mostly last, as in a question, sometimes with a sign."""
    asked = list(words)
    place = len(asked) if rng.random() < 0.6 else int(rng.integers(len(asked) + 1))
    asked.insert(place, title)
    if rng.random() < 0.5:
        asked[place] += _SIGNS[int(rng.integers(len(_SIGNS)))]
    return asked


def _kept(own: Sequence[str], before: Collection[str], rng: np.random.Generator) -> list[int]:
    """Places of the kept words: a random part of them, enlarged until none before has all."""
    order = [int(i) for i in rng.permutation(len(own))]
    rival = [set(other.lower().split()) for other in before]
    for count in range(int(rng.integers(1, len(own) + 1)), len(own) + 1):
        asked = {own[i].lower() for i in order[:count]}
        if not any(asked <= words for words in rival):
            return sorted(order[:count])
    return list(range(len(own)))


def _noise_word(words: Sequence[str], vocabulary: Sequence[str], rng: np.random.Generator) -> str:
    pool = words if rng.random() < 0.5 else vocabulary
    return pool[int(rng.integers(len(pool)))]
