"""`make bench`: both sides take turns under one setting of the C library, and all is told.

Our own side stands in for PyTorch's, which needs the extra `[bench]`.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run


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
    code = run.main()

    assert [one["GLIBC_TUNABLES"] for one in started] == [kept, kept]
    assert f"\nGLIBC_TUNABLES={kept}\n" in capsys.readouterr().out
    told = json.loads(file.read_text())
    assert told["glibc_tunables"] == kept
    assert told["sizes"] == ["index_rows=500", "search_queries=4"]
    (one,) = told["results"]
    ours, theirs = one["seconds"]["ours"], one["seconds"]["theirs"]
    ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
    assert len(ratios) == 3 and min(ours + theirs) > 0
    assert one["ratio"] == statistics.median(ratios)
    assert (one["ratio_low"], one["ratio_high"]) == (min(ratios), max(ratios))
    assert min(one["peak_mib"].values()) > 50
    assert code == (0 if one["ratio"] >= 1 else 1)


def test_an_unknown_workload_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--workloads=serach_8"])
    with pytest.raises(SystemExit):
        run.main()
    assert "unknown workloads ['serach_8']; known: train_step, " in capsys.readouterr().err
