"""`make plan-table`: rows are made once and anew when stale; smallest slices are told from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gin
import pytest

from atlas_jax import from_gin
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.config import gin_folder, load_gin
from atlas_jax.plan import UNREAD
from atlas_jax.planning.report import DISAGREEMENT, versions
from atlas_jax.training.chips import GIB
from benchmarks import plan_table
from benchmarks.plan_table import Row

SMALL, LARGE = (
    Row("base", "nq_full", "v5e-8", "1,8,1", "full", 8),
    Row("base", "nq_full", "v5e-16", "1,16,1", "full", 4),
)


def plan(
    seconds: float | None, peak: float = 8, agreement: float = 1.0, **terms: int
) -> dict[str, Any]:
    train = {
        "mesh": "data=1 fsdp=16 model=1", "fits": seconds is not None,
        "bytes_per_chip": {"parameters": GIB, "optimiser": 2 * GIB, "index tokens": GIB // 2}
        | terms,
        "peak_bytes_per_chip": int(peak * GIB), "largest_index": 41_000_000,
    }  # fmt: skip
    if seconds:
        train |= {"step_seconds": seconds, "binding": "compute", "mfu": 0.5}
        train |= {"step_seconds_without_overlap": 2 * seconds, "mfu_without_overlap": 0.25}
        train["compiled_to_counted_flops"] = agreement
    starting = [{"program": "start", "peak_bytes_per_chip": GIB // 4}]
    return {
        "programs": [train], "tried": [train], "starting": starting,
        "hbm_bytes_per_chip": 16 * GIB,
        "versions": versions(), "batch_size": 64, "k": 40, "reader_length": 512,
    }  # fmt: skip


def made(row: Row, *figures: Any, **terms: int) -> dict[str, Any]:
    return {"inputs": plan_table.digest(row), "plan": plan(*figures, **terms)}


def lines_of(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


def batch_of(row: Row) -> int:
    """Queries a step, as the row's gin files say."""
    load_gin(row.files, row.bindings, unread=UNREAD)
    batch = from_gin.told(DataConfig).batch_size
    gin.clear_config()
    return batch


def test_every_row_is_of_a_real_slice_whose_mesh_fills_it_and_divides_its_batch() -> None:
    for row in plan_table.ROW_LIST:
        for mesh in row.meshes:
            data, fsdp, split = map(int, mesh.split(","))
            assert data * fsdp * split == row.slice.chips
            assert batch_of(row) % (data * fsdp * row.accumulate) == 0
        assert all((gin_folder() / file).exists() for file in row.files)
        assert row.recipe in plan_table.RECIPES
    assert len({row.name for row in plan_table.ROW_LIST}) == len(plan_table.ROW_LIST)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of rows and page, for the rows `SMALL` and `LARGE`."""
    monkeypatch.setattr(plan_table, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(plan_table, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr(plan_table, "ROW_LIST", (SMALL, LARGE))
    return tmp_path


def test_a_second_call_makes_only_what_is_missing_or_stale(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, times = [], iter([None, 2.5, 1.25, 5.0, 5.0])

    def planned(row: Row, seconds: float) -> dict[str, Any] | None:
        asked.append(row)
        found = next(times)
        return plan(found, temporaries=GIB) if found else None

    monkeypatch.setattr(plan_table, "_plan", planned)
    plan_table.main([])
    assert asked == [SMALL, LARGE]
    plan_table.main(["--minutes", "-1"])  # no time for the one without result
    assert len(asked) == 2
    plan_table.main([])
    assert asked[2:] == [SMALL]
    plan_table.main([])
    assert len(asked) == 3
    rows = json.loads((written / "rows.json").read_text())
    assert set(rows) == {SMALL.name, LARGE.name}
    rows[LARGE.name]["inputs"] = "another recipe"
    (written / "rows.json").write_text(json.dumps(rows))
    plan_table.main(["--minutes", "-1"])
    page = (written / "table.md").read_text()
    assert "| yes, stale | 8.00 |" in lines_of(page, "| base | nq_full | v5e-16")[0]
    plan_table.main([])
    assert asked[3:] == [LARGE]
    rows = json.loads((written / "rows.json").read_text())
    del rows[LARGE.name]["plan"]["starting"]  # as rows were before starts were planned
    (written / "rows.json").write_text(json.dumps(rows))
    plan_table.main([])
    assert asked[4:] == [LARGE]
    page = (written / "table.md").read_text()
    for cell in (
        "| yes | 8.00 | 16.00 | 3.00 | 0.50 | 1.00 | 0.25 |",
        "| 5.00 to 10.00 | compute | 50% to 25% | 41M |",
    ):
        assert (
            cell
            in lines_of(
                page, "| base | nq_full | v5e-16 | bfloat16 | shipped | full | standard | 4 |"
            )[0]
        )


def test_the_smallest_slice_that_fits_is_told_with_what_does_not() -> None:
    def smallest(rows: dict[str, Any]) -> str:
        start = "| base | nq_full | bfloat16 | v5e | "
        return lines_of(plan_table.page(rows), start)[0].removeprefix(start)

    large = {LARGE.name: made(LARGE, 2.5, 8, temporaries=GIB)}
    how = "v5e-16 (4 microbatches, remat full) | 8.00 | 16.00 | 2.50 to 5.00 | v5e-8: "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_table, "ROW_LIST", (SMALL, LARGE))
        assert smallest(large) == how + "not tried |"
        small = made(SMALL, None, 17)
        assert smallest(large | {SMALL.name: small}) == how + "no, 17.00 by arguments alone |"
        small = made(SMALL, None, 18, temporaries=GIB)
        assert smallest(large | {SMALL.name: small}) == how + "no, 18.00 |"
        assert smallest({SMALL.name: small}) == "larger |  |  |  | v5e-8: no, 18.00 |"
        small = made(SMALL, 5.0, 9, temporaries=GIB)
        assert smallest(large | {SMALL.name: small}).startswith("v5e-8 (8 microbatches")


@pytest.mark.parametrize(
    ("agreement", "mark"),
    [(1.0, ""), (1 + 0.9 * DISAGREEMENT, ""), (1 - 1.1 * DISAGREEMENT, " ?"), (1.168, " ?")],
)
def test_times_whose_products_were_miscounted_are_marked(
    agreement: float, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_table, "ROW_LIST", (LARGE,))
    page = plan_table.page({LARGE.name: made(LARGE, 2.5, 8, agreement, temporaries=GIB)})
    (smallest,) = lines_of(page, "| base | nq_full | bfloat16 | v5e |")
    (whole,) = lines_of(page, "| base | nq_full | v5e-16 | bfloat16")
    assert f" | 16.00 | 2.50 to 5.00{mark} |" in smallest
    assert f"| 2.50 to 5.00{mark} | compute | 50% to 25%{mark} | 41M |" in whole
    assert "has over 10% more or" in page


def test_a_row_of_the_pretraining_recipe_stands_last_and_says_what_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretraining = Row("base", "mlm_pretrain", "v5e-16", "1,16,1", "full", 8)
    assert batch_of(pretraining) == 128
    monkeypatch.setattr(plan_table, "ROW_LIST", (pretraining, LARGE))
    one, other = made(pretraining, 1.5, temporaries=GIB), made(LARGE, 2.5, temporaries=GIB)
    one["plan"] |= {"batch_size": 128, "k": 20, "reader_length": 384}
    assert one["inputs"] != other["inputs"]
    page = plan_table.page({pretraining.name: one, LARGE.name: other})
    smallest = lines_of(page, "| base | ")[:2]
    assert [line.split(" | ")[1] for line in smallest] == ["nq_full", "mlm_pretrain"]
    first, second = lines_of(page, "- `")
    assert first.startswith("- `nq_full`: 64 queries a step, each with k = 40 passages; 512 tokens")
    assert second.startswith("- `mlm_pretrain`: 128 queries a step, each with k = 20 passages; 384")
    assert lines_of(plan_table.page({LARGE.name: other}), "- `") == [first]


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": "nq_64shot"},
        {"index": "int8"},
        {"accumulate": 2},
        {"mesh": "1,4,4"},
        {"remat": ""},
    ],
)
def test_a_row_is_stale_when_what_it_is_made_of_changes(changed: dict[str, Any]) -> None:
    other = dataclasses.replace(LARGE, **changed)
    assert plan_table.is_stale(other, made(LARGE, 1.0))
    assert not plan_table.is_stale(LARGE, made(LARGE, 1.0))
    assert plan_table.is_stale(LARGE, {"plan": plan(1.0)})


def test_bounds_are_recomputed_from_the_work_that_a_row_holds() -> None:
    chip = LARGE.slice.chip
    train = {
        "fits": True, "flops_per_chip": 3 * chip.bf16_flops,
        "model_flops_per_chip": 2 * chip.bf16_flops,
        "hbm_bytes_moved_per_chip": 2 * chip.hbm_bandwidth, "step_seconds": 99.0,
        "network_per_chip": [{"axes": "fsdp", "links": 1, "bytes": chip.ici_bandwidth / 2}],
    }  # fmt: skip
    found = plan_table.recomputed(LARGE, {"programs": [train], "tried": [{"fits": False}]})
    assert found["tried"] == [{"fits": False}]
    (one,) = found["programs"]
    assert one["roofline_seconds"] == {"compute": 3.0, "memory": 2.0, "network": 1.0}
    assert (one["step_seconds"], one["step_seconds_without_overlap"]) == (3.0, 4.0)
    assert (one["mfu"], one["mfu_without_overlap"]) == (pytest.approx(2 / 3), 0.5)


def test_the_committed_rows_have_the_bounds_that_their_work_gives() -> None:
    rows = plan_table._read_rows()
    compiled = [
        row for row in plan_table.ROW_LIST if "mfu" in rows[row.name]["plan"]["programs"][0]
    ]
    assert len(compiled) > 60
    for row in compiled:
        made = rows[row.name]["plan"]
        assert "network_per_chip" in made["programs"][0], row.name
        assert plan_table.recomputed(row, made) == made, row.name


def test_a_row_is_stale_when_programs_are_read_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: str) -> str:
        (tmp_path / "atlas_jax").mkdir(exist_ok=True)
        (tmp_path / "atlas_jax/one.py").write_text(source)
        monkeypatch.setattr(plan_table, "ROOT", tmp_path)
        monkeypatch.setattr(plan_table, "READING", ("one",))
        plan_table._reading.cache_clear()
        return plan_table._reading()

    first = read('"""Doc."""\ndef f(x):\n    """What."""\n    return x + 1\n')
    assert first == read("def f(x):  # why\n    return x + 1\n")
    assert first != read("def f(x):\n    return x + 2\n")
    plan_table._reading.cache_clear()


def test_what_a_row_sets_is_bound() -> None:
    row = Row("xxl", "nq_full", "v5e-128", "1,32,4")
    assert row.name == "xxl/nq_full/v5e-128"
    assert "CorpusConfig.dtype=bfloat16" in row.bindings
    assert not any("remat" in binding or "accumulate" in binding for binding in row.bindings)
    full = dataclasses.replace(row, index="int8", remat="full", accumulate=2, passage_length=256)
    assert full.name == "xxl/nq_full/v5e-128/full/accumulate=2/int8/passages=256"
    for binding in ("CorpusConfig.dtype=int8", "StepConfig.accumulate=2", "PASSAGE_LENGTH=256"):
        assert binding in full.bindings
    assert "ReaderConfig.remat_policy=full" in full.bindings


def test_the_committed_page_is_what_the_committed_rows_give() -> None:
    rows = plan_table._read_rows()
    assert plan_table.TABLE.read_text() == plan_table.page(rows)


def test_a_larger_corpus_has_a_table_of_its_programs_and_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = dataclasses.replace(LARGE, mesh="1,16,1 16,1,1", passages=400_000_000)
    monkeypatch.setattr(plan_table, "ROW_LIST", (LARGE, row))
    large = made(row, 2.5, 8, temporaries=GIB)
    train, other = large["plan"]["programs"][0], {"mesh": "data=16 fsdp=1 model=1"}
    large["plan"]["tried"].append(train | other | {"step_seconds": 3.5})
    search = {"program": "search", "resident_bytes_per_chip": {"index tokens": GIB}}
    large["plan"]["programs"] = [train | {"program": "train"}, train | search]
    large["plan"]["starting"] = [
        {"program": "restart", "fits": True, "bytes_per_chip": {}, "peak_bytes_per_chip": GIB}
    ]
    page = plan_table.page({LARGE.name: made(LARGE, 2.5, 8, temporaries=GIB), row.name: large})
    start = "| base | nq_full | v5e-16 | bfloat16 | 400M | data=1 fsdp=16 model=1 | "
    assert [line.removeprefix(start) for line in lines_of(page, start)] == [
        "train | yes | 8.00 | 16.00 | 0.50 | 2.5 to 5 | compute |",
        "search | yes | 8.00 | 16.00 | 1.00 | 2.5 to 5 | compute |",
        "restart | yes | 1.00 | 16.00 | 0.00 |  |  |",
    ]
    assert len(lines_of(page, "| base | nq_full | v5e-16 | bfloat16 | shipped")) == 1
    (usual,) = lines_of(page, "| base | nq_full | bfloat16 | v5e |")
    assert "v5e-16" in usual
    assert plan_table._mesh(large["plan"]) == (
        "data=1 fsdp=16 model=1 (data=16 fsdp=1 model=1: 3.50 to 5.00 s)"
    )
