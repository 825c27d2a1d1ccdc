"""`make plan-table`: rows are made once, kept with their versions, and missing ones are marked."""

import json
from pathlib import Path
from typing import Any

import pytest

from atlas_jax.core.chips import parse_slice
from atlas_jax.core.config import gin_folder
from atlas_jax.planning.report import versions
from benchmarks import plan_table


def plan(seconds: float | None) -> dict[str, Any]:
    train = {
        "mesh": "data=1 fsdp=16 model=1", "fits": seconds is not None,
        "bytes_per_chip": {"parameters": 2**30, "optimiser": 2**31, "index tokens": 2**29},
        "peak_bytes_per_chip": 2**33, "largest_index": 41_000_000,
    }  # fmt: skip
    if seconds:
        train |= {"step_seconds": seconds, "binding": "compute", "mfu": 0.5}
    return {"programs": [train], "hbm_bytes_per_chip": 2**34, "versions": versions()}


def test_every_row_is_of_a_real_slice_whose_mesh_fills_it_and_divides_its_batch() -> None:
    for model, recipe, where, mesh, *_ in plan_table.SPECS:
        data, fsdp, split = map(int, mesh.split(","))
        assert data * fsdp * split == parse_slice(where).chips
        assert (128 if recipe == "mlm_pretrain" else 64) % (data * fsdp) == 0
        for file in (f"models/{model}.gin", f"runs/{recipe}.gin"):
            assert (gin_folder() / file).exists()


def test_a_second_call_makes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_table, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(plan_table, "TABLE", tmp_path / "table.md")
    asked, times = [], iter([1.25, None, 2.5, 0.5, 5.0])

    def made(spec: tuple[str, ...], seconds: float) -> dict[str, Any] | None:
        asked.append(plan_table.row_name(spec))
        found = next(times)
        return plan(found) if found else None

    monkeypatch.setattr(plan_table, "_plan", made)
    plan_table.main(["--only", "base/"])
    first = ["base/nq_64shot/v5e-16", "base/nq_64shot/v5e-16/full", "base/nq_full/v5e-16/full"]
    first.append("base/nq_64shot/v5e-16/full/int8")
    assert asked == first
    plan_table.main(["--only", "base/", "--minutes", "-1"])  # no time for the one without result
    assert len(asked) == 4
    plan_table.main(["--only", "base/"])
    assert asked[4:] == [first[1]]
    assert set(json.loads((tmp_path / "rows.json").read_text())) == set(asked)
    lines = (tmp_path / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| base | nq_full | v5e-16 | full"))
    for cell in ("| yes | 8.00 | 16.00 | 3.00 | 0.50 |", "| 2.50 | compute | 50% | 41M |"):
        assert cell in row
    assert "not compiled yet" in next(line for line in lines if line.startswith("| xxl"))
    assert any(line.startswith("| base | nq_64shot | v5e-16, int8 | full | ") for line in lines)


def test_what_a_row_sets_is_bound() -> None:
    spec = ("xxl", "nq_full", "v5e-128", "1,32,4")
    assert "CorpusConfig.dtype=bfloat16" in plan_table.bindings(spec)
    assert not any("remat" in binding for binding in plan_table.bindings((*spec, "int8")))
    both = plan_table.bindings((*spec, "full", "int8"))
    assert "CorpusConfig.dtype=int8" in both and "CorpusConfig.dtype=bfloat16" not in both
    assert "ReaderConfig.remat_policy=full" in both


def test_the_committed_page_is_what_the_committed_rows_give() -> None:
    rows = plan_table._read_rows()
    assert plan_table.TABLE.read_text() == plan_table.table(rows)
