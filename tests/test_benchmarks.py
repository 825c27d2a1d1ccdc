"""`make bench`: both sides take turns under one setting of the C library, and all is told.

Our own side stands in for PyTorch's, which needs the extra `[bench]`.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.planning.flops import matmul_flops
from benchmarks import real_text, run
from benchmarks.worker import tried
from benchmarks.workloads import (
    Sizes,
    bert_gflop,
    gflop,
    passages_of_real_lengths,
    search_arrays,
)

SMALL = Sizes(index_rows=20_000, search_queries=4, retriever_width=16)


@pytest.mark.parametrize(
    ("given", "kept"), [(None, run.KEEP_FREED_MEMORY), ("", ""), ("glibc.malloc.hugetlb=1",) * 2]
)
def test_both_sides_run_with_one_setting_that_is_told(
    given: str | None,
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if given is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    started = []

    class Worker(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            started.append(kwargs["env"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run.subprocess, "Popen", Worker)
    monkeypatch.setattr(run, "SIDES", {"ours": "ours", "theirs": "ours"})
    monkeypatch.setattr(run, "PACKAGES", ("jax",))
    file = tmp_path / "bench.json"
    call = ["--rounds=3", "--workloads=search_8", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["run", *call, "index_rows=500", "search_queries=4"])
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    code = run.main()

    assert all("OPENBLAS_CORETYPE" not in one for one in started)
    assert [one["GLIBC_TUNABLES"] for one in started] == [kept, kept]
    out = capsys.readouterr().out
    assert f"\nGLIBC_TUNABLES={kept}\n" in out
    assert "not given to either side: OPENBLAS_CORETYPE" in out
    told = json.loads(file.read_text())
    assert told["glibc_tunables"] == kept
    assert told["sizes"] == ["index_rows=500", "search_queries=4"]
    (one,) = told["results"]
    ours, theirs = one["seconds"]["ours"], one["seconds"]["theirs"]
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    assert len(ratios) == 3 and min(ours + theirs) > 0
    assert one["ratio"] == statistics.median(ratios)
    assert (one["ratio_low"], one["ratio_high"]) == (min(ratios), max(ratios))
    assert one["gflop"] == 2e-9 * 4 * 500 * 384
    assert one["gflop_per_s"]["ours"] == one["gflop"] / statistics.median(ours)
    assert min(one["peak_mib"].values()) > 50
    assert code == (0 if one["ratio"] >= 1 else 1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("serach_8", "unknown workloads ['serach_8']; known: train_step, "),
        ("step_squad", "step_squad: name SQuAD's folder with --squad"),
    ],
)
def test_a_workload_that_cannot_run_is_named(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", f"--workloads={name}"])
    with pytest.raises(SystemExit):
        run.main()
    assert says in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize("k", [3, 5_000])
def test_all_ways_of_exact_search_find_the_same_rows(k: int) -> None:
    """5,000: more than the last block of rows has."""
    alternatives = pytest.importorskip("benchmarks.alternatives", reason="needs [bench]")
    embeddings, queries = search_arrays(SMALL)
    expected = np.argsort(-(queries @ embeddings.T), axis=1)[:, :k]
    ways = alternatives.search(SMALL, k)
    assert {name.split(",")[0] for name in ways} == {"faiss", "PyTorch", "NumPy"}
    for name, search in ways.items():
        rows = np.asarray(search()[1])
        assert (rows == expected).mean() > 0.999, name  # equal scores but for rounding


def test_the_fastest_way_comes_first() -> None:
    ways = {"slow": lambda: sum(range(300_000)), "fast": lambda: None}
    assert list(tried(ways)) == ["fast", "slow"]


def test_the_work_is_that_of_the_products() -> None:
    """A passage alone and one batch, against the products in the models' own programs."""
    from benchmarks import ours

    sizes = dataclasses.replace(Sizes(), batch=1, passages=1, embed_passages=1)
    models = ours.models_of(sizes)
    source, target = jnp.ones((1, sizes.length), int), jnp.ones((1, sizes.target), int)
    assert models.reader is not None
    lengths = (passages_of_real_lengths(sizes) > 0).sum(axis=1)

    def read(params: object) -> jax.Array:
        return models.reader.apply(params, source, target)

    def embed(params: object) -> jax.Array:
        tokens = jnp.ones((1, int(lengths[0])), int)
        return models.retriever.apply(params, tokens, True, method="embed_passage")

    reader = jax.eval_shape(lambda: models.reader.init(jax.random.key(0), source, target))
    retriever = jax.eval_shape(
        lambda: models.retriever.init(jax.random.key(0), source, True, method="embed_passage")
    )
    for workload, function, params in (("generate", read, reader), ("embed", embed, retriever)):
        counted = matmul_flops(jax.make_jaxpr(function)(params)) / 1e9
        assert gflop(workload, sizes) == pytest.approx(counted, rel=0.01), workload


TINY = Sizes(
    reader_width=16, reader_layers=1, reader_mlp=16, reader_heads=2, reader_vocab=31_000,
    retriever_width=16, retriever_layers=1, retriever_mlp=16, retriever_heads=2,
    batch=8, passages=2, length=8, target=3, query_length=4, embed_passages=40,
    real_batch=8, real_passages=4,
)  # fmt: skip


def test_ours_runs_the_step_and_writes_all_tokens() -> None:
    from benchmarks import ours

    answers = np.asarray(ours.generate(TINY)())
    assert answers.shape == (TINY.batch, TINY.target) and (answers != 0).any()
    assert np.isfinite(ours.train_step(TINY)())


@pytest.fixture
def squad(tmp_path: Path) -> Sizes:
    """Sizes whose SQuAD are forty passages of 10 to 150 words, of four titles, and questions."""
    passages = [
        {"id": f"p{n}", "title": f"T{n // 10}", "text": "river " * (10 + 37 * n % 141)}
        for n in range(40)
    ]
    questions = [{"question": f"What is {n}?", "gold": [f"p{n}"]} for n in range(40)]
    for name, rows in (("passages", passages), ("test", questions)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return dataclasses.replace(TINY, squad=str(tmp_path))


def test_real_texts_are_as_long_as_they_come(squad: Sizes) -> None:
    found = real_text.batches(squad, "squad")
    assert len(found) == real_text.BATCHES
    lengths = real_text.lengths(squad, "squad")
    assert len(lengths) == len(found) * 8 * 4 and lengths.min() < 60 < 120 < lengths.max() <= 384
    again = real_text.batches(squad, "squad")
    assert [one.inputs_bk for one in again] == [one.inputs_bk for one in found]
    one = dataclasses.replace(TINY, embed_passages=1, squad=squad.squad)
    (passage,) = real_text.passage_tokens(one, "squad")
    assert real_text.gflop("embed_squad", one) == bert_gflop(one, np.array([len(passage)]))
    assert real_text.gflop("step_squad", squad) > 3 * real_text.gflop("generate_squad", squad)


def test_ours_packs_real_texts(squad: Sizes, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import ours

    assert np.isfinite(ours.real_step(squad, "squad")())
    told = capsys.readouterr().err
    assert "(StepConfig.packed_rows)" in told and "(StepConfig.packed_passages)" in told
    assert "they share" in told and "of its own" not in told
    assert np.asarray(ours.real_generate(squad, "squad")()).shape == (8, squad.target)


@pytest.mark.parity
def test_the_alternative_reads_the_same_texts(squad: Sizes) -> None:
    alternatives = pytest.importorskip("benchmarks.alternatives", reason="needs [bench]")
    assert np.isfinite(alternatives.real_step(squad, "squad")())
    assert alternatives.real_generate(squad, "squad")().shape[0] == 8
    embedded = alternatives.real_embed(squad, "squad")()
    assert sum(map(len, embedded)) == squad.embed_passages
