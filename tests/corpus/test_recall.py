"""The certificate of recall: what an approximate search misses is counted, and bounded."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.answering import inference
from atlas_jax.answering.atlas import Atlas
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, make_mesh
from atlas_jax.corpus import recall
from atlas_jax.corpus.config import RecallConfig
from atlas_jax.corpus.recall import RecallCheck, check_bound, interval, sample
from atlas_jax.index.inspection import describe
from atlas_jax.index.scann_index import ScannConfig
from atlas_jax.index.search import SearchResult
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import assemble, export_model
from tests.training.runs import write_run

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(50, 4)).astype(np.float32)
QUERIES = RNG.normal(size=(6, 4)).astype(np.float32)
EXCLUDED = np.array([[-1, -1], [3, 40], [-1, 7], [0, -1], [-1, -1], [49, 1]], np.int32)
BATCH: Any = SimpleNamespace(
    excluded_rows_bx=EXCLUDED, weight_b=np.array([1, 1, 1, 1, 0, 0], np.float32)
)


def exact(k: int) -> np.ndarray:
    scores = QUERIES @ ROWS.T
    for row, excluded in enumerate(EXCLUDED):
        scores[row, excluded[excluded >= 0]] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


class Misses:
    """A searcher that never finds the best row of the first two queries."""

    def search(self, query_be: Any, k: int, excluded_bx: Any) -> SearchResult:
        rows_bk = exact(k)
        rows_bk[:2, 0] = -1
        return SearchResult(rows_bk=rows_bk, scores_bk=np.zeros(rows_bk.shape))


def checked(monkeypatch: pytest.MonkeyPatch, config: RecallConfig) -> dict[str, float]:
    monkeypatch.setattr(recall, "_ROWS", 16)  # several parts
    corpus: Any = SimpleNamespace(
        index=None, searcher=Misses(), host_ne=ROWS, recall_target=1.0, saved_index=""
    )
    mesh, nothing = make_mesh(MeshConfig(), jax.devices()[:1]), SimpleNamespace()
    check = RecallCheck(corpus, nothing, 4, mesh, place=lambda batch: batch)  # type: ignore
    monkeypatch.setattr(check, "_embed", lambda params, batch: QUERIES)
    return check.certificate({}, [BATCH], config)


def test_what_was_missed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(monkeypatch, RecallConfig())
    # Two of four questions missed one of four rows; rows of weight 0 do not count.
    assert found["search_recall@4"] == pytest.approx(1 - 2 / 16)
    assert found["search_recall@4_low"] < found["search_recall@4"] < found["search_recall@4_high"]


def test_below_the_bound_the_run_warns_or_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked(monkeypatch, RecallConfig(least=0.9))
    assert "search_recall@4 = 0.875" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"below RecallConfig\.least = 0\.9"):
        checked(monkeypatch, RecallConfig(least=0.9, below="stop"))
    check_bound({"r": 0.9}, RecallConfig(least=0.9, below="stop"), "r")


def test_the_range_is_wilsons_and_the_sample_repeats_itself() -> None:
    assert interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(1.0, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    some = sample(range(1000), RecallConfig(sample=5, seed=1))
    assert some == sample(range(1000), RecallConfig(sample=5, seed=1)) == sorted(some)
    assert some != sample(range(1000), RecallConfig(sample=5, seed=2))
    assert sample(range(3), RecallConfig(sample=5)) == [0, 1, 2]


@pytest.mark.parametrize("target", [0.95, 1.0])
def test_retrieve_tells_it_where_the_search_is_approximate(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path, target: float
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    bound = {
        "RetrieveConfig.file": f"'{tmp_path / 'test.jsonl'}'",
        "RetrieveConfig.output": f"'{tmp_path / 'found.jsonl'}'",
        "RetrieveConfig.k": "5",
        "CorpusConfig.recall_target": str(target),
    }
    load_gin([str(gin_file)], [f"{name}={value}" for name, value in bound.items()])
    scores = inference.retrieve(from_gin.retrieve_run())
    told = {name: value for name, value in scores.items() if name.startswith("search_recall")}
    if target == 1.0:
        assert told == {}
    else:  # only a TPU selects approximately
        assert told["search_recall@5"] == told["search_recall@5_high"] == 1.0
        assert 0.4 < told["search_recall@5_low"] < 1.0


def test_scanns_recall_is_known_where_the_index_is_saved(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("scann", reason="needs ScaNN")
    load_gin([str(write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file))])
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(from_gin.models(), mesh, rules)
        export_model(tmp_path / "model", made.models, made.params, made.tokenizers, "float32", {})
    told = {"store": tmp_path / "store", "index": tmp_path / "index"}
    formats = StoreConfig(reader_length=40, retriever_length=40)
    passages = tmp_path / "passages.jsonl"
    atlas_jax.build_index(tmp_path / "model", passages=passages, **told, formats=formats)
    run = atlas_jax.load(tmp_path / "model", **told, data={"query_length": 48}).told

    def scores(index: str) -> dict[str, float]:
        config = dataclasses.replace(run.corpus.config, searcher="scann", index=index)
        corpus = dataclasses.replace(run.corpus, config=config, scann=ScannConfig(hash_from=4))
        atlas = Atlas(dataclasses.replace(run, corpus=corpus))
        return atlas.evaluate(tmp_path / "test.jsonl", generate=False, recall_at=(5,), k=5).scores

    assert "search_recall@5" not in scores("")
    assert "CorpusConfig.index" in capsys.readouterr().err
    assert describe(told["index"])["recall"] == []
    found = scores(str(told["index"]))
    low, recall, high = (found[f"search_recall@5{end}"] for end in ("_low", "", "_high"))
    assert 0 <= low <= recall <= high <= 1 and recall > 0.2
    (note,) = describe(told["index"])["recall"]
    assert [note[name] for name in ("low", "recall", "high", "k")] == [low, recall, high, 5]
    assert note["search"]["searcher"] == "scann" and note["search"]["hash_from"] == 4
    assert note["questions"] == 3 and note["passages_version"] == 0
