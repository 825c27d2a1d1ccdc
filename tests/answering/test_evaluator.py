"""Answers do not depend on how the rows fall into batches, and one program serves them all."""

import dataclasses
from pathlib import Path

import pytest

from atlas_jax import from_gin
from atlas_jax.answering import evaluation, inference
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.evaluation import make_evaluation
from atlas_jax.answering.evaluator import Found, mean_loss, tokens_per_call
from atlas_jax.answering.run import AnswerRun
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.models import assembly
from atlas_jax.tasks.base import Example
from tests.training.runs import write_run


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch_size(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    questions = tmp_path / "questions.jsonl"
    load_gin([str(gin_file)], [f"EvalConfig.file='{questions}'", "EvalConfig.passages='none'"])
    questions.write_text(
        "".join(f'{{"question": "What is {word}?"}}\n' for word in "a b c d e f g h i j k".split())
    )
    told = from_gin.answer_run()

    def in_batches_of(size: int) -> AnswerRun:
        return dataclasses.replace(
            told, evaluation=dataclasses.replace(told.evaluation, batch_size=size)
        )

    with use_devices(told.devices) as (mesh, rules):
        made = assembly.assemble(told.models, mesh, rules)
        rest = (made.models, made.tokenizers, None, mesh, rules)
        small = make_evaluation(in_batches_of(8), *rest)
        large = make_evaluation(in_batches_of(16), *rest)
        found, scores = small.run(made.params)
        together, _ = large.run(made.params)
    assert [one.example.id for one in found] == [str(i) for i in range(1, 12)]
    assert [one.answer for one in found] == [one.answer for one in together]
    assert scores == {}  # no accepted answers, nothing searched
    assert all(0 < one.written_tokens <= one.decoder_calls for one in found)  # greedy
    assert small.evaluator.answer is not None
    assert small.evaluator.answer._cache_size() == 1  # type: ignore[attr-defined]
    assert small.evaluator.find._cache_size() == 1  # type: ignore[attr-defined]


def test_the_loss_is_a_mean_over_tokens_or_over_the_means_of_batches() -> None:
    def found(log_probability: float | None, tokens: int) -> Found:
        return Found(Example("1", "q"), (), "a", None, (), log_probability, tokens)

    rows = [found(-4.0, 2), found(-2.0, 2), found(-6.0, 1), found(None, 0)]
    assert mean_loss(rows, 0) == {"loss": pytest.approx((4 + 2 + 6) / 5)}
    assert mean_loss(rows, 2) == {"loss": pytest.approx(((4 + 2) / 4 + 6) / 2)}
    assert mean_loss(rows[3:], 0) == mean_loss(rows[3:], 2) == {}


def test_tokens_per_call_is_over_all_answers_that_were_written() -> None:
    def found(tokens: int, calls: int) -> Found:
        return Found(Example("1", "q"), (), "a", written_tokens=tokens, decoder_calls=calls)

    rows = [found(6, 2), found(3, 3), found(0, 0)]
    assert tokens_per_call(rows) == {"tokens_per_call": pytest.approx(9 / 5)}
    assert tokens_per_call(rows[2:]) == {}  # a beam search is not counted


@pytest.mark.parametrize(("loss", "asked"), [("tokens", True), ("batches", True), ("none", False)])
def test_an_evaluation_scores_the_targets_that_it_has(
    loss: str,
    asked: bool,
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> None:
    """`loss` is what the compiled scores of the targets give; without targets there is none."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    questions = tmp_path / "questions.jsonl"
    answers = ("a long answer of words", "b", "c")
    questions.write_text(
        "".join(f'{{"question": "What?", "answers": ["{text}"]}}\n' for text in answers)
    )
    bindings = [f"EvalConfig.file='{questions}'", "EvalConfig.passages='none'",
                f"EvalConfig.loss='{loss}'"]  # fmt: skip
    load_gin([str(gin_file)], bindings)
    told = from_gin.answer_run()
    with use_devices(told.devices) as (mesh, rules):
        made = assembly.assemble(told.models, mesh, rules)
        rest = (made.models, made.tokenizers, None, mesh, rules)
        found, scores = make_evaluation(told, *rest).run(made.params)
    assert ("loss" in scores) is asked
    if asked:
        tokens = [len(made.tokenizers.reader.encode(f"<extra_id_0> {a}", True)) for a in answers]
        lengths = [min(n, told.data.target_length) for n in tokens]
        assert [one.target_tokens for one in found] == lengths
        log_probs = [one.target_log_probability or 0.0 for one in found]
        assert scores["loss"] == pytest.approx(-sum(log_probs) / sum(lengths))
        assert scores["loss"] > 1  # of a model that knows nothing


@pytest.mark.slow
def test_a_sample_follows_from_the_seed_and_the_questions_number(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What?"}\n' * 12)

    def sampled(batch_size: int, seed: int) -> list[str | None]:
        bindings = {"EvalConfig.file": f"'{questions}'", "EvalConfig.passages": "'none'",
                    "GenerationConfig.method": "'sample'", "GenerationConfig.seed": seed,
                    "EvalConfig.batch_size": batch_size}  # fmt: skip
        load_gin([str(gin_file)], [f"{name}={value}" for name, value in bindings.items()])
        return [one.answer for one in inference.evaluate(from_gin.answer_run()).found]

    answers = sampled(8, seed=0)
    assert answers[:4] != answers[4:8] and answers[:4] != answers[8:]  # in one batch, in two
    assert sampled(8, seed=0) == answers
    assert sampled(16, seed=0) == answers
    assert sampled(8, seed=1) != answers
    load_gin([str(gin_file)], ["EvalConfig.passages='none'", "GenerationConfig.method='sample'"])
    for _ in range(2):
        atlas = Atlas(from_gin.answer_run())
        assert [atlas.ask("What?").text for _ in range(3)] == answers[:3]


@pytest.mark.parametrize(("k", "read"), [(0, 3), (1, 1), (5, 5)])
def test_an_evaluation_reads_as_many_passages_as_it_says(
    k: int,
    read: int,
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What?", "passages": [{"text": "It is."}]}\n')
    bindings = [f"EvalConfig.file='{questions}'", "EvalConfig.passages='file'", f"EvalConfig.k={k}"]
    load_gin([str(gin_file)], bindings)
    seen: list[int] = []
    monkeypatch.setattr(evaluation, "make_answer", lambda *a: seen.append(a[2].k))
    told = from_gin.answer_run()
    with use_devices(told.devices) as (mesh, rules):
        made = assembly.assemble(told.models, mesh, rules)
        make_evaluation(told, made.models, made.tokenizers, None, mesh, rules)
    assert seen == [read]
