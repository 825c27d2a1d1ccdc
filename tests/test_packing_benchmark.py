"""`python -m benchmarks.packing`: padded and packed passages give the same, and both are timed."""

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import packing


def test_both_forms_compute_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = (
        "reader_width=32 reader_layers=1 reader_mlp=32 reader_heads=2 reader_vocab=99 "
        "retriever_width=32 retriever_layers=1 retriever_mlp=32 retriever_heads=2 "
        "retriever_vocab=99 target=3 passages=12 embed_passages=80"
    ).split()
    file = tmp_path / "packing.json"
    code = packing.main(["--rounds=2", f"--json={file}", *small])
    told = json.loads(file.read_text())
    out = capsys.readouterr()
    assert f"they share {told['rows']} rows" in out.err
    sizes = f"{told['rows']} rows for 12 inputs of 384, {told['shared']} for the retriever"
    assert sizes in out.out
    assert 5 < told["rows"] < 9 and 5 < told["shared"] < 9
    assert [one["workload"] for one in told["results"]] == list(packing.WORKLOADS)
    for one in told["results"]:
        assert one["difference"] < 1e-5
        padded, packed = one["seconds"]["padded"], one["seconds"]["packed"]
        ratios = [a / b for a, b in zip(padded, packed, strict=True)]
        assert one["ratio"] == statistics.median(ratios) and len(ratios) == 2
    packs = [one for one in told["results"] if one["workload"] != "embed"]
    assert code == (0 if all(one["ratio"] >= 1 for one in packs) else 1)
