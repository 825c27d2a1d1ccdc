"""What cannot be scored is told, in words and once, before an evaluation begins."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from atlas_jax import from_gin
from atlas_jax.answering.scorable import tell_unscorable, within_corpus
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.tasks.base import Example, Prediction


def example(name: str, answers: Sequence[str] = ("a",), gold: Sequence[str] = ()) -> Example:
    return Example(name, "question", "question", answers=tuple(answers), gold_ids=tuple(gold))


@pytest.fixture
def store(
    tmp_path: Path,
    passages_file: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> PassageStore:
    tokenizers = map(Tokenizer.from_file, (reader_tokenizer_file, retriever_tokenizer_file))
    return PassageStore.build(passages_file, tmp_path / "store", *tokenizers, progress=False)


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ([example("1"), example("2")], []),
        (
            [example("1", ()), example("2", ())],
            ["dev.jsonl has no accepted answers: what is answered is not scored"],
        ),
        (  # one record asked twice counts once
            [example("1"), example("2", ()), example("2", ()), example("3", ())],
            [
                "dev.jsonl: 2 of 3 records have no accepted answers (the first is '2'); the "
                "scores of answers are those of the others"
            ],
        ),
    ],
)
def test_questions_without_answers(
    examples: list[Example], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tell_unscorable("dev.jsonl", examples, True, None)
    assert caplog.messages == told
    caplog.clear()
    tell_unscorable("dev.jsonl", examples, False, None)  # nothing is answered
    assert caplog.messages == []


def test_gold_passages_that_the_store_lacks(
    store: PassageStore, caplog: pytest.LogCaptureFixture
) -> None:
    there = example("1", gold=["arvo-1", "coro-2"])
    tell_unscorable("dev.jsonl", [there], True, store)
    assert caplog.messages == []
    examples = [there, example("2", gold=["x1", "arvo-1"]), example("3", gold=["x2", "x1"])]
    tell_unscorable("dev.jsonl", examples, True, store)
    assert caplog.messages == [
        f"dev.jsonl: 2 of 4 gold passage ids are not in {store.directory} (the first is 'x1'), so "
        "they count as not found; is the file of another corpus?"
    ]


def test_recall_beyond_the_corpus_is_left_out(
    store: PassageStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert within_corpus((1, 5, 20), None) == (1, 5, 20)
    assert within_corpus((1, 5, 6), store) == (1, 5, 6)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        assert within_corpus((1, 5, 20, 100), store) == (1, 5)
    assert caplog.messages == [
        "EvalConfig.recall_at: the corpus has 6 passages, so recall@20, @100 is left out"
    ]


def test_a_file_without_answers_has_no_scores_of_answers() -> None:
    task = from_gin.task("qa")
    assert task.evaluate([Prediction(example("1", ()), "an answer")]) == {}
