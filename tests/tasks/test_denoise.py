"""Tasks `bart` and `mass`: how much is damaged, how, and what has to be written."""

import re

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.tasks.base import Example
from atlas_jax.tasks.denoise import MASK, BartTask, MassTask

WORDS = 60
TEXT = " ".join(f"{'W' if i % 6 == 0 else 'w'}{i}{'.' if i % 6 == 5 else ''}" for i in range(WORDS))


def examples(tmp_path, task, number=400) -> list[Example]:
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [{"id": "p", "title": "T", "text": TEXT}])
    [record] = task.load(path)
    return [task.example(record, np.random.default_rng(i)) for i in range(number)]


def kept(query: str) -> list[int]:
    return [int(n) for n in re.findall(r"[Ww](\d+)", query)]


def test_bart_masks_three_tenths_in_spans_of_poisson_length(tmp_path):
    found = examples(tmp_path, BartTask(permute_sentences=False))
    masks = []
    for example in found:
        words = kept(example.query_text)
        assert len(words) == WORDS - 18
        assert words == sorted(set(words))
        assert example.target_text == TEXT
        assert example.excluded_ids == ("p",)
        assert MASK not in example.retriever_text
        masks.append(example.query_text.count(MASK))
    # 18 words in spans of 3.5 words on average; the last one is cut.
    assert 5.2 < np.mean(masks) < 6.2
    adjacent = any(f"{MASK} {MASK}" in example.query_text for example in found)
    assert adjacent  # by chance, or for a span of no words


def test_bart_puts_sentences_into_another_order_and_keeps_them_whole(tmp_path):
    firsts = set()
    for example in examples(tmp_path, BartTask(noise_density=0.02), 50):
        words = kept(example.query_text)
        sentences = [n // 6 for n in words]
        changes = sum(a != b for a, b in zip(sentences, sentences[1:], strict=False))
        assert changes == 9  # ten sentences, each in one piece
        firsts.add(sentences[0])
    assert len(firsts) > 5


def test_mass_masks_one_run_of_half_the_words_in_place(tmp_path):
    shares = []
    for example in examples(tmp_path, MassTask()):
        pieces = example.query_text.split()
        assert len(pieces) == WORDS
        run = kept(example.target_text)
        assert run == list(range(run[0], run[0] + 30))
        outside = [*range(run[0]), *range(run[-1] + 1, WORDS)]
        assert [kept(pieces[i])[0] for i in outside] == outside
        shares.append([pieces[i] == MASK for i in run])
    np.testing.assert_allclose(np.mean(shares), 0.8, atol=0.02)


@pytest.mark.parametrize("task", [BartTask(), MassTask()])
def test_without_a_seed_the_damage_follows_from_the_id(tmp_path, task):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [{"id": "p", "title": "T", "text": TEXT}])
    [record] = task.load(path)
    assert task.example(record) == task.example(record)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BartTask(noise_density=1.0), "BartTask.noise_density = 1.0: expected between"),
        (lambda: BartTask(mean_span_words=0), "BartTask.mean_span_words = 0: expected more than 0"),
        (lambda: MassTask(noise_density=0), "MassTask.noise_density = 0: expected between 0 and 1"),
        (lambda: MassTask(min_words=1), "MassTask.min_words = 1: expected 2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
