"""A large index is in 8 bits by itself, and what it finds is scored exactly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.results import Passage
from atlas_jax.core.config import load_gin
from atlas_jax.corpus import rounding
from atlas_jax.corpus.config import CorpusConfig, RecallConfig
from atlas_jax.corpus.rounding import needs_tokens, new_dtype, settled, settled_rerank
from atlas_jax.index.inspection import describe
from atlas_jax.plan import UNREAD
from atlas_jax.planning.run import Run
from atlas_jax.training.config import StepConfig
from tests.test_face import QUESTIONS, SETTINGS, work  # noqa: F401  (a fixture)

WIDTH = 768
MOST = rounding.INT8_ABOVE // 4 // WIDTH  # passages in float32


@pytest.mark.parametrize(
    ("config", "count", "dtype"),
    [
        (CorpusConfig(), MOST, "float32"),
        (CorpusConfig(), MOST + 1, "int8"),
        (CorpusConfig(searcher="scann"), 50 * MOST, "float32"),  # compresses by itself
        (CorpusConfig(dtype="bfloat16"), 50 * MOST, "bfloat16"),
        (CorpusConfig(dtype="int8"), 10, "int8"),
    ],
)
def test_the_size_decides_where_nobody_does(config: CorpusConfig, count: int, dtype: str) -> None:
    assert 1_300_000 < MOST < 1_500_000
    assert new_dtype(config, count, WIDTH) == dtype


def test_rescoring_comes_with_the_choice_and_can_be_bound() -> None:
    auto, bound = CorpusConfig(), CorpusConfig(dtype="int8")
    assert settled_rerank(-1, 20, auto, "int8") == 40
    for config, dtype in ((auto, "float32"), (auto, ""), (bound, "int8")):
        assert settled_rerank(-1, 20, config, dtype) == 0
    for told in (0, 30):
        assert settled_rerank(told, 20, auto, "int8") == told
    step = settled(StepConfig(k=20), auto, None, WIDTH)
    assert (step.rerank, step.searched, step.k) == (0, 20, 20)
    assert [needs_tokens(rerank) for rerank in (-1, 0, 30)] == [None, False, True]


@pytest.fixture(scope="module")
def large(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Atlas]:  # noqa: F811
    """Loads a saved index of passages that are taken to be many."""
    folder = tmp_path_factory.mktemp("large")
    told: dict[str, Any] = {"store": folder / "store", "index": folder / "index"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "INT8_ABOVE", 1000)
        passages = work / "passages.jsonl"
        atlas_jax.build_index(
            work / "model", passages=passages, formats=SETTINGS["formats"], **told
        )
    return lambda: atlas_jax.load(work / "model", **told, **SETTINGS)


def scored(passages: list[Passage]) -> dict[str, Any]:
    return {one.id: pytest.approx(one.score, abs=1e-4) for one in passages}


def test_what_is_found_has_exact_scores_also_after_changes(
    work: Path,  # noqa: F811
    large: Callable[..., Atlas],
) -> None:
    atlas = large()
    index = atlas.told.corpus.config.index
    assert describe(index)["dtype"] == "int8"
    exact = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    for question in QUESTIONS:
        found, expected = atlas.retrieve(question, k=5), exact.retrieve(question, k=5)
        assert {one.id: one.score for one in found} == scored(expected)
        assert atlas.ask(question).text == exact.ask(question).text
    gone = [one.id for one in atlas.retrieve(QUESTIONS[0], k=5)][:2]
    rest = atlas.ask(QUESTIONS[0], k=3, exclude=gone).passages
    assert not {one.id for one in rest} & set(gone)
    new = {"id": "n", "title": "Arvo", "text": "The capital of Arvo is Nova."}
    atlas.change_passages(add=[new], delete=gone)
    anew, built = atlas.retrieve(QUESTIONS[0], k=5), large().retrieve(QUESTIONS[0], k=5)
    assert {one.id: one.score for one in anew} == scored(built)
    assert not {one.id for one in anew} & set(gone)


def test_the_certificate_tells_what_rounding_costs(
    work: Path,  # noqa: F811
    large: Callable[..., Atlas],
) -> None:
    told = large().told
    recall = RecallConfig(sample=20)
    atlas = Atlas(dataclasses.replace(told, corpus=dataclasses.replace(told.corpus, recall=recall)))
    scores = atlas.evaluate(work / "test.jsonl", generate=False, recall_at=(3,), k=3).scores
    assert 0.9 < scores["search_recall@3"] <= scores["search_recall@3_high"] <= 1.0
    note = describe(told.corpus.config.index)["recall"][-1]
    assert note["k"] == 3 and note["search"]["dtype"] == "int8" and note["search"]["rescored"] == 6
    exact = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    plain = exact.evaluate(work / "test.jsonl", generate=False, recall_at=(3,), k=3).scores
    assert "search_recall@3" not in plain


def test_the_choice_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounding, "INT8_ABOVE", 1000)
    rounding.tell_chosen(CorpusConfig(), 40, 32)
    assert "40 passages of 32 numbers" in (said := capsys.readouterr().err)
    assert "the index is in int8" in said and "CorpusConfig.dtype = 'auto'" in said
    rounding.tell_chosen(CorpusConfig(dtype="int8"), 40, 32)
    rounding.tell_chosen(CorpusConfig(), 7, 32)
    assert capsys.readouterr().err == ""


def test_a_plan_counts_with_the_same_choice() -> None:
    for passages, dtype, times in ((1_000_000, "float32", 0), (2_000_000, "int8", 2)):
        load_gin(["models/base.gin", "runs/nq_full.gin"], unread=UNREAD)
        run = from_gin.plan_run(passages)
        assert isinstance(run, Run)
        assert (run.corpus.dtype, run.step.rerank) == (dtype, times * run.step.k)
