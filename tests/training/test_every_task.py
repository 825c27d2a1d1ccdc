"""Every task trained and evaluated end to end, alike on one device and, packed, on eight."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from atlas_jax.core import partitioning
from atlas_jax.tasks import registry
from atlas_jax.tasks.classification import CLASSIFICATION
from atlas_jax.train import main as train_main
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import CAPITALS, COUNTRIES, read_lines, write_lines, write_run


def write_tasks(folder: Path) -> None:
    """A file of each task about the countries of `write_run`."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS if name not in PASSAGES}
    for number, (country, capital) in enumerate(zip(COUNTRIES, CAPITALS, strict=True)):
        other = CAPITALS[number - 1]
        gold = [f"p{number}"]
        question = f"What is the capital of {country}?"
        claim = f"{capital if number % 2 else other} is the capital of {country}."
        label = "SUPPORTS" if number % 2 else "REFUTES"
        rows["fever"].append({"claim": claim, "label": label, "gold": gold})
        rows["boolq"].append({"question": claim, "answer": number % 2 == 1, "gold": gold})
        follows = {"premise": question, "hypothesis": claim}
        rows["rte"].append({**follows, "label": "entailment" if number % 2 else "not_entailment"})
        options = {"A": other, "B": capital, "C": "Nile"}
        rows["multiple_choice"].append({"question": question, "options": options, "answer": "B"})
        output = [{"answer": capital, "provenance": [{"wikipedia_id": gold[0]}]}]
        rows["kilt"].append({"id": str(number), "input": question, "output": output})
        answers = {"answers_old": [other], "answers_new": [capital]}
        rows["temporal"].append({"question": question, **answers, "changed": number < 4})
        rows["qa"].append({"question": question, "answers": [capital], "gold": gold})
        rows["base"].append({"query": claim, "target": capital, "choices": [other, capital]})
        facts = f"Capital: name: {capital}. Languages: Arvic."
        rows["cloze"].append({"id": gold[0], "title": country, "text": facts})
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", lines)
    passages = read_lines(folder / "passages.jsonl")
    for name in PASSAGES:
        write_lines(folder / f"{name}.jsonl", [p for p in passages if p.get("section")])


PASSAGES = ("mlm", "lm", "section", "bart", "mass")
# Bindings, and the scores that the evaluation has to bring.
TASKS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "fever": (
        ("FeverTask.answer_by=likelihood", "EvalConfig.explain=True"),
        {"accuracy", "accuracy_supports", "accuracy_refutes", "recall@5"},
    ),
    "boolq": (("BoolQTask.answer_by=likelihood",), {"accuracy", "accuracy_true", "recall@5"}),
    "rte": ((), {"accuracy", "accuracy_entailment", "accuracy_not_entailment"}),
    "multiple_choice": (
        ("MultipleChoiceTask.eval_orders=cyclic", "MultipleChoiceTask.train_orders=all",
         "MultipleChoiceTask.prompt_format=so", "DataConfig.prompt_length=4",
         "DataConfig.query_length=120", "StepConfig.reader_length=338"),
        {"accuracy", "debiased_accuracy", "answer_recall@5"},
    ),
    "kilt": (
        ("KILTTask.prompt_format='{input}'", "DataConfig.prompt_length=40",
         "GenerationConfig.min_length=2", "GenerationConfig.method=beam",
         "GenerationConfig.num_beams=2"),
        {"exact_match", "kilt_f1", "r_precision", "recall@5"},
    ),
    "temporal": (
        ("TemporalTask.edition=new", "TemporalTask.other=old"),
        {"changed_followed", "changed_stayed", "unchanged_right"},
    ),
    "qa": ((), {"exact_match", "f1", "recall@5", "answer_recall@5"}),
    "base": (("BaseTask.prompt_format=so", "DataConfig.prompt_length=4"), {"exact_match", "f1"}),
    "mlm": (("MLMTask.min_words=5",), {"exact_match", "f1"}),
    "cloze": (("ClozeTask.filter_self=True", "ClozeTask.noise=0.2"), {"exact_match", "f1"}),
    "bart": (("BartTask.min_words=5",), {"rouge1", "rougeL"}),
    "mass": (("MassTask.min_words=5",), {"rouge1", "rougeL"}),
    "lm": (("LMTask.min_words=5",), {"rouge1", "rouge2", "rougeL"}),
    "section": (
        ("SectionTask.min_words=5", "SectionTask.filter=section", "DataConfig.max_excluded=2"),
        {"rougeL"},
    ),
}  # fmt: skip


# Of `ranking` nothing is learnt; `sentences` needs a store of its passages (tests/tasks). Of the
# classification tasks, which differ in words alone, one is trained here.
ELSEWHERE = {"ranking", "sentences"} | {task.name for task in CLASSIFICATION} - {"rte"}


def test_every_task_of_the_registry_is_trained_here_or_elsewhere() -> None:
    assert set(TASKS) | ELSEWHERE == set(registry.TASKS)
    assert not set(TASKS) & ELSEWHERE


# Two inputs, of 64 + 48 + 1 tokens at most, share a row. Dropout draws otherwise for shared rows.
ALIKE = (
    "StepConfig.reader_length=226", "ReaderConfig.dropout_rate=0.0",
    "RetrieverConfig.dropout_rate=0.0",
)  # fmt: skip


def run(gin_file: Path, task: str, model_dir: Path, packed_rows: int) -> int:
    bindings, _ = TASKS[task]
    bindings = (*ALIKE, f"StepConfig.packed_rows={packed_rows}", *bindings)
    file = gin_file.parent / f"{task}.jsonl"
    return train_main(
        [
            f"--gin_file={gin_file}",
            f"--gin.TrainConfig.model_dir={model_dir}",
            "--gin.TrainConfig.total_steps=1",
            *(f"--gin.{name}.file={file}" for name in ("TrainConfig", "EvalConfig")),
            *(f"--gin.{name}.task={task}" for name in ("TrainConfig", "EvalConfig")),
            *(f"--gin.{binding}" for binding in bindings),
        ]
    )


def assert_alike(one: Any, other: Any) -> None:
    """Equal, numbers to a tolerance."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            if "second" not in name:
                assert_alike(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_and_answers_alike_on_one_device_and_packed_on_eight(
    task: str,
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    write_tasks(tmp_path)
    eight, metrics, predictions = jax.devices(), [], []
    meshes: list[int] = []  # how many devices each run has computed on
    make_mesh = partitioning.make_mesh

    def noted(*args: Any) -> Any:
        mesh = make_mesh(*args)
        meshes.append(mesh.size)
        return mesh

    monkeypatch.setattr(partitioning, "make_mesh", noted)
    for devices, rows in ((eight, 2), (eight[:1], 0)):
        monkeypatch.setattr(jax, "devices", lambda *_, chosen=devices: chosen)
        model_dir = tmp_path / f"on_{len(devices)}"
        assert run(gin_file, task, model_dir, rows) == 0, capsys.readouterr().err
        metrics.append(read_metrics(model_dir))
        predictions.append(read_lines(model_dir / "predictions" / "step_0000001.jsonl"))
    assert meshes == [8, 1]
    trained, scores = metrics[0]
    assert trained["train/reader_loss"] > 0 and trained.pop("train/packed") == 1
    assert {f"eval/{name}" for name in TASKS[task][1]} <= set(scores)
    assert_alike(metrics[0], metrics[1])
    assert_alike(predictions[0], predictions[1])
    for row in predictions[0]:
        json.dumps(row, allow_nan=False)
    if task == "fever":
        passage = predictions[0][0]["passages"][0]
        assert {"attention", "alone", "left_out"} <= set(passage)
        assert "attention" not in predictions[0][0]["passages"][4]  # found, but k = 3 are read
    if task == "multiple_choice":
        assert [row["order"] for row in predictions[0][:3]] == ["ABC", "BCA", "CAB"]
    if task == "kilt":
        assert predictions[0][0]["output"][0]["provenance"][0]["wikipedia_id"]
