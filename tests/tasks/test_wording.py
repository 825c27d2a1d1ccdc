"""How a label is disturbed: what stays of it, what it must not be taken for, what surrounds it."""

from collections import Counter

import numpy as np

from atlas_jax.tasks import wording

WORDS = ("wine", "wine", "wine", "stone")
VOCABULARY = ("wine", "stone", "lamp", "kettle")
LABEL = "Executive branch chief of state"
BEFORE = {"Executive branch head of government", "Legislative branch chief note", "Capital"}


def draw(label: str = LABEL, before: set[str] = BEFORE, times: int = 600) -> list[list[str]]:
    return [
        wording.disturbed(label, before, WORDS, VOCABULARY, np.random.default_rng(seed))
        for seed in range(times)
    ]


def kept(asked: list[str]) -> list[str]:
    return [word for word in asked if word not in VOCABULARY]


def test_what_is_kept_is_of_the_label_and_of_none_before_it() -> None:
    for asked in draw():
        own = Counter(kept(asked))
        assert own and not own - Counter(LABEL.split())
        assert not any(set(own) <= set(other.split()) for other in BEFORE)
    # "state" tells it from the others by itself; "chief", "branch" and "of" do not
    singles = {tuple(kept(asked)) for asked in draw() if len(kept(asked)) == 1}
    assert singles == {("state",)}


def test_a_label_that_one_before_it_holds_whole_stays_whole() -> None:
    for asked in draw("Area total", {"Area total land"}):
        assert sorted(kept(asked)) == ["Area", "total"]


def test_every_part_every_order_and_every_noise_is_met() -> None:
    found = [kept(asked) for asked in draw()]
    assert {len(words) for words in found} == {1, 2, 3, 4, 5}
    in_order = [words == [w for w in LABEL.split() if w in words] for words in found]
    assert 0.5 < sum(in_order) / len(in_order) < 0.9
    noise = [[word for word in asked if word in VOCABULARY] for asked in draw()]
    assert {len(words) for words in noise} == set(range(8))
    often = Counter(word for words in noise for word in words)
    assert often["wine"] > 1.5 * often["stone"] > 0 < often["kettle"]


def test_the_title_is_mostly_last_and_sometimes_signed() -> None:
    asked = [wording.around(["a", "b"], "Chad", np.random.default_rng(i)) for i in range(400)]
    places = [next(i for i, w in enumerate(words) if w.startswith("Chad")) for words in asked]
    assert set(places) == {0, 1, 2} and 0.6 < places.count(2) / 400 < 0.85
    titles = {words[place] for words, place in zip(asked, places, strict=True)}
    assert titles == {"Chad", "Chad?", "Chad.", "Chad,", "Chad's"}


def test_a_reworded_question_keeps_words_in_their_order() -> None:
    words = "what is the name of the capital city of".split()
    lost, added = [], []
    for seed in range(300):
        found = wording.reworded(words, ["noise"], ["rare"], np.random.default_rng(seed))
        own = [word for word in found if word not in ("noise", "rare")]
        rest = iter(words)
        assert own and all(word in rest for word in own)  # a part of the words, in their order
        lost.append(len(words) - len(own))
        added.append(len(found) - len(own))
    assert set(added) == {0, 1, 2} and 0 in lost and 1 < np.mean(lost) < 3.5


def test_a_question_of_one_word_keeps_it() -> None:
    for seed in range(50):
        assert "capital" in wording.reworded(["capital"], ["a"], ["b"], np.random.default_rng(seed))
