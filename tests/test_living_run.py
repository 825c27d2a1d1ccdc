"""A run over a store that was changed computes what one over a store of these passages does.

It goes on with the version that its checkpoint searched. The index is refreshed in slices, its rows
are int8, and more passages are scored anew than are read (`ROLLING`). No passage is retrieved for
itself.
"""

from pathlib import Path

import pytest

import atlas_jax
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.changes import Batch, change
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.train import main as train_main
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import read_lines, write_lines, write_run
from tests.training.test_resume import ROLLING


@pytest.mark.slow
def test_a_run_over_a_changed_store_is_resumed_as_of_its_version_and_equals_one_from_nothing(
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    files = {"reader": reader_tokenizer_file, "retriever": retriever_tokenizer_file}
    towers = {name: Tokenizer.from_file(file) for name, file in files.items()}
    lengths, store = StoreConfig(reader_length=48, retriever_length=48), tmp_path / "store"
    PassageStore.build(
        tmp_path / "passages.jsonl", store, *towers.values(), lengths, progress=False
    )
    new = {"id": "new", "text": "The capital of Iria is Usk."}
    other = {**read_lines(tmp_path / "passages.jsonl")[2], "text": "Bera has no capital."}
    changed = change(store, Batch(add=[new], replace=[other], delete=["p0"]), towers)
    held = [changed.passage(row) for row in range(changed.count)]
    passages = write_lines(tmp_path / "held.jsonl", held)

    def run(name: str, steps: int, *flags: str) -> int:
        bindings = {
            "TrainConfig.model_dir": tmp_path / name, "TrainConfig.total_steps": steps,
            "TrainConfig.task": "'mlm'", "MLMTask.min_words": 4, "EvalConfig.file": "''",
            "TrainConfig.file": f"'{passages}'", "DataConfig.target_length": 16,
            "CheckpointConfig.every": 3, "StepConfig.k": 2,
            "StepConfig.retriever_training": "'joint'", **ROLLING,
        }  # fmt: skip
        given = [f"--gin.{key}={value}" for key, value in bindings.items()]
        return train_main([f"--gin_file={gin_file}", *given, *flags])

    assert run("whole", 6) == run("part", 3) == 0
    anew = {"passages": passages, "store": tmp_path / "held"}
    bound = [f"--gin.CorpusConfig.{name}='{path}'" for name, path in anew.items()]
    assert run("anew", 6, *bound) == 0
    assert atlas_jax.change_index(store=store, delete=["r0"]) == 2
    assert run("part", 6) == 2
    told = capsys.readouterr().err
    assert f"the checkpoint searched version 1 of {store}, which now is at version 2" in told
    assert "bind CorpusConfig.as_of = '1'" in told
    assert run("part", 6, "--as_of=1") == 0
    rows = [
        [row for row in read_metrics(tmp_path / name) if "train/reader_loss" in row]
        for name in ("whole", "part", "anew")
    ]
    for name in ("reader_loss", "retriever_loss", "reader_grad_norm", "retriever_grad_norm"):
        whole, part, anew_values = ([row[f"train/{name}"] for row in run] for run in rows)
        assert len(whole) == 6 and whole == part
        assert anew_values == pytest.approx(whole, rel=1e-5)
