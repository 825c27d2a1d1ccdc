"""`benchmarks.fewshot`: runs from an encoder to a table, what is kept, what is compared."""

from pathlib import Path

import jax
import pytest

from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training.pet import members_of
from benchmarks import fewshot, kept
from tests.training.classified import TASK, WORDS, save_tiny, write_texts


def run_of(accuracy: float, **more: float) -> dict[str, float]:
    return {"accuracy": accuracy, "texts": 20.0, "seconds": 1.0, **more}


def test_a_table_from_files_keeps_what_is_done(
    tmp_path: Path, retriever_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_tiny(tmp_path / "encoder", retriever_tokenizer_file)
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    write_texts(folder / "train_10shot_seed1.jsonl", 10)
    write_texts(folder / "test.jsonl.gz", 30, seed=3)
    write_jsonl(folder / "unlabelled.jsonl", [{"text": " ".join(WORDS[i:])} for i in range(6)])
    results = tmp_path / "results.json"
    call = [
        f"--encoder={tmp_path / 'encoder'}", f"--data={tmp_path / 'data'}", "--tasks=sst2",
        f"--out={tmp_path / 'out'}", "--shots=10", "--seeds=1", "--questions=20", "--length=12",
        "--rows=majority;probe;prompt, LoRA;self-training", "--steps=1", "--rounds=1",
        "--round_steps=1,1,1", f"--report={tmp_path / 'report.md'}", f"--results={results}",
    ]  # fmt: skip
    (tmp_path / "report.md").write_text(f"Words.\n{kept.BEGIN}\nold\n{kept.END}\nMore.\n")
    monkeypatch.setattr(fewshot, "TASKS", {"sst2": lambda: TASK})
    assert fewshot.main(call) == 0
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("Words.\n") and report.endswith("\nMore.\n") and "old" not in report
    whole = kept.read(results)
    assert whole is not None and fewshot.page(whole).strip() in report
    stored = {name: one.figures for name, one in whole.runs.items()}
    asked = [row["label"] for _, row in read_jsonl(tmp_path / "out" / "sst2_test_20.jsonl")]
    # The majority of five and five is the first label.
    assert stored["sst2/10/1/majority"]["accuracy"] == asked.count("negative") / 20
    assert f"| majority | {5 * asked.count('negative'):.1f} (0.0)" in report
    loaded = load_encoder(tmp_path / "encoder")
    head = sum(leaf.size for leaf in jax.tree.leaves(loaded.params["mlm"]))
    lora = stored["sst2/10/1/prompt, LoRA"]
    assert lora["trained"] == head + 2 * 2 * 8 * 16  # query and value, A and B, rank 8, width 16
    assert stored["sst2/10/1/self-training"]["trained"] == head + 2 * 2 * 64 * 16
    assert f"| {lora['trained']:,.0f} (" in report
    assert "| prompt | not run |" in report and "**not run**" in report

    def again(bench: fewshot.Bench, case: fewshot.Case) -> dict[str, float]:
        seen.append(case.row)
        assert not load_encoder(bench.encoder).deltas
        return run_of(0.5)

    seen: list[str] = []
    monkeypatch.setattr(fewshot, "run_case", again)
    for name in ("encoder", "data"):  # as on another machine: what decides a run is no path
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    call = [one.replace(f"{tmp_path}/encoder", f"{tmp_path}/moved_encoder")
               .replace(f"{tmp_path}/data", f"{tmp_path}/moved_data") for one in call]  # fmt: skip
    assert fewshot.main(call) == 0 and not seen
    assert fewshot.main([*call, "--steps=2"]) == 2
    assert "has runs with other settings: steps was 1 and is 2" in capsys.readouterr().err
    assert fewshot.main([*call, "--rows=probes"]) == 2
    assert "'probes' is unknown; there is majority" in capsys.readouterr().err
    write_texts(tmp_path / "moved_data" / "sst2" / "train_10shot_seed1.jsonl", 12)
    assert fewshot.main([*call, "--rows=probe"]) == 0
    assert seen == ["probe"]  # its data are others now
    save_tiny(tmp_path / "other", retriever_tokenizer_file, seed=2)
    assert fewshot.main([*call, f"--encoder={tmp_path / 'other'}"]) == 2
    assert "other settings: encoder was" in capsys.readouterr().err
    part = tmp_path / "out" / "runs" / "sst2_10_1_prompt_LoRA" / "final"  # its base has moved
    more = [f"--encoder={part}", f"--before={tmp_path / 'moved_encoder'}", "--rows=classic, before"]
    assert fewshot.main([*call, *more, f"--results={tmp_path / 'more.json'}"]) == 0
    assert seen == ["probe", "classic, before"]
    # draws the page, and no more
    assert fewshot.main([f"--results={results}", "--tasks=sst2"]) == 0
    assert "| probe | 50.0 (0.0) |" in capsys.readouterr().out
    assert fewshot.main([f"--results={tmp_path / 'none.json'}", "--tasks=sst2"]) == 2
    assert "has no runs yet; give --encoder and --data" in capsys.readouterr().err


def test_the_report_is_drawn_from_what_is_kept() -> None:
    reports = Path(fewshot.__file__).parents[1] / "docs" / "reports"
    whole = kept.read(reports / "fewshot.json")
    assert whole is not None
    marked = (reports / "fewshot.md").read_text().partition(kept.BEGIN)[2].partition(kept.END)[0]
    assert marked.strip() == fewshot.page(whole).strip()


def test_pet_has_a_member_a_pattern_and_the_steps_of_all_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train_30shot_seed2", "test", "unlabelled"):
        (tmp_path / "rte").mkdir(exist_ok=True)
        line = {"premise": "a", "hypothesis": "b", "label": "entailment"}
        write_jsonl(tmp_path / "rte" / f"{name}.jsonl", [line])
    told = []
    monkeypatch.setattr(fewshot, "pet", lambda run: told.append(run) or {"accuracy": 0.5})
    bench = fewshot.Bench("e", "", str(tmp_path), str(tmp_path / "out"), 0, 0, 50, 7, 4, 1e-5, 1e-3,
                          2, (5, 3, 1))  # fmt: skip
    found = fewshot.run_case(bench, fewshot.Case("rte", 30, 2, "PET"))
    assert found["accuracy"] == 0.5 and "trained" not in found
    (run,) = told
    assert (run.train.steps, run.train.distil_steps, run.train.seed) == (7, 18, 2)
    assert (run.train.length, run.train.learning_rate) == (128, 1e-5)
    assert run.train.unlabelled_rows == 50
    assert len(list(members_of(run))) == len(fewshot.PATTERNS["rte"]) == 3
    assert all(one.task.template for one in members_of(run))  # parsed, with one mask each


def test_a_verdict_compares_the_seeds_that_both_rows_have() -> None:
    runs = {
        "sst2/30/1/prompt": run_of(0.80), "sst2/30/2/prompt": run_of(0.82),
        "sst2/30/1/classic": run_of(0.60), "sst2/30/2/classic": run_of(0.62),
        "sst2/30/3/classic": run_of(0.99), "sst2/10/1/prompt": run_of(0.1),
        "rte/30/1/prompt": run_of(0.1),
    }  # fmt: skip
    lines = list(fewshot.verdicts(runs, "sst2", 30, 100))
    (line,) = [line for line in lines if line.startswith("| a prompt beats a classifier")]
    assert "| +20.0 | 1.4 | **shown** |" in line
    scores = "\n".join(fewshot.table(runs, "sst2", 30))
    assert "| prompt | 81.0 (1.0) | 80.0, 82.0 |" in scores
