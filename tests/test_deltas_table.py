"""The table of what part of a reader trains."""

from pathlib import Path

import pytest

from benchmarks import deltas, kept


def figures(score: float, trained: float, seconds: float) -> kept.Measured:
    own = {"EM": score, "F1": score + 5, "trained": trained, "bytes": 2.5e6, "seconds": seconds}
    return kept.Measured("", own)


def test_a_row_is_the_mean_of_its_seeds_beside_training_all() -> None:
    runs = {
        "LoRA/0": figures(10, 1234, 1.0), "all/0": figures(20, 20_000, 2.0),
        "LoRA/1": figures(13, 1234, 1.5),
    }  # fmt: skip
    lines = deltas.table(kept.Kept({}, runs)).splitlines()
    assert "| LoRA | 0.01 | 2 | 11.5 | 16.5 | 1,234 (6.2 %) | 2.50 MB | 0.62 |" in lines
    assert "| prefix | 0.003 | not run | | | | | |" in lines


def test_what_is_done_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []

    def train(row: str, folder: Path, data: Path, steps: int, seed: int) -> Path:
        seen.append((row, seed))
        return folder

    monkeypatch.setattr(deltas, "train", train)
    monkeypatch.setattr(deltas, "measured", lambda *_: figures(1, 2, 3).figures)
    monkeypatch.setattr(deltas.factbook, "prepare", lambda data: data.mkdir())
    monkeypatch.setattr(deltas, "read_jsonl", lambda _: [(1, {"id": "a"})])
    monkeypatch.setattr(deltas.atlas_jax, "build_index", lambda *_, **__: None)
    call = [f"--results={tmp_path / 'kept.json'}", "--rows=all,LoRA", "--steps=2", "--count=1"]
    deltas.main(call)
    deltas.main([*call, "--seeds=2"])
    assert seen == [("all", 0), ("LoRA", 0), ("all", 1), ("LoRA", 1)]
    assert "| LoRA | 0.01 | 2 | 1.0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        deltas.main([*call, "--steps=3"])
    assert "has runs with other settings: steps was 2 and is 3" in capsys.readouterr().err


def test_an_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deltas.main(["--rows=all,lora"])
    assert "--rows: no row 'lora'; there are all, adapters (LiST)" in capsys.readouterr().err


def test_every_row_has_its_file() -> None:
    gin = Path(deltas.__file__).parents[1] / "gin" / "deltas"
    assert all((gin / f"{file}.gin").is_file() for file, _ in deltas.ROWS.values() if file)
