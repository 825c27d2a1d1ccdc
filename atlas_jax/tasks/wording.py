"""The wording of a cloze query: a label as it is, or disturbed to be more like a question.

A question has some of a label's words, in another order and among words that the label lacks. A
reader that has seen such queries in pretraining learns to find the label that shares most words
with a question. If several labels do, it learns to take the first, which is the main one of its
field (`Capital: name: ..; time difference: ..`).
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
      label: the label that is asked for.
      before: the labels before it in its passage; it must not be confused with them.
      words: words of running text, as often as they occur: mostly small words.
      vocabulary: words of running text, each once: so rare words are seen too.
      rng: random source of the choice.

    Returns:
      The words. No label in `before` contains all kept words of the label, unless it contains the
      whole label.
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

    The same question in other words mostly shares some words with this one. A reader that has seen
    this one with gaps learns to use the words that are left.

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
    """Add the title to the words, mostly at their end, and sometimes a question mark."""
    asked = list(words)
    place = len(asked) if rng.random() < 0.6 else int(rng.integers(len(asked) + 1))
    asked.insert(place, title)
    if rng.random() < 0.5:
        asked[place] += _SIGNS[int(rng.integers(len(_SIGNS)))]
    return asked


def _kept(own: Sequence[str], before: Collection[str], rng: np.random.Generator) -> list[int]:
    """Places of the kept words: a random part, enlarged until no label before has all of them."""
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
