"""ALBERT and RoBERTa as the retriever of a run: from Hugging Face's layout, taught by PDist."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from atlas_jax.conversion.convert import Conversion, convert
from atlas_jax.interop.vocabularies import checked
from atlas_jax.models.folder import load_config, load_model
from atlas_jax.train import main
from atlas_jax.training.metrics import read_metrics
from tests.interop.test_encoders import roberta_tokenizer
from tests.training.claims import RETRIEVER, save_pair
from tests.training.runs import write_run

ENCODERS = {
    "albert": {"factor_dim": 8, "num_groups": 2},
    "roberta": {},
}
BINDINGS = (
    "EvalConfig.file=''", "CheckpointConfig.every=1", "StepConfig.k=2",
    "StepConfig.reader_length=64", "RefreshPolicy.schedule='1'",
)  # fmt: skip


def from_hugging_face(folder: Path, pair: Path) -> Path:
    """The pair's retriever, written as Hugging Face's model and read again."""
    for source, target, one, other in (
        ("atlas-jax", "hf", pair, folder / "hf"),
        ("hf", "atlas-jax", folder / "hf", folder / "retriever"),
    ):
        job = Conversion(source, target, (str(one),), str(other), part="retriever")
        convert(job, lambda line: None)
    return folder / "retriever"


def retriever_of(folder: Path) -> dict[str, np.ndarray]:
    part = load_model(folder, ("retriever",))["retriever"]
    flat: dict[str, np.ndarray] = traverse_util.flatten_dict(part.params, sep="/")
    return flat


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "training"), [("albert", "joint"), ("roberta", "query_side")])
def test_a_converted_retriever_learns_from_the_reader_and_goes_on_when_killed(
    encoder: str,
    training: str,
    tmp_path: Path,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> None:
    fields = {
        **RETRIEVER, "hidden_dim": 16, "num_layers": 2, "max_positions": 64, "encoder": encoder,
        "encoder_options": ENCODERS[encoder],
    }  # fmt: skip
    if encoder == "roberta":  # whose vocabulary begins with `<s>`, then `<pad>`
        text = checked(roberta_tokenizer(tmp_path), "retriever", "here")
        retriever_tokenizer_file = tmp_path / "roberta.json"
        retriever_tokenizer_file.write_text(text, "utf-8")
    pair = save_pair(tmp_path / "pair", reader_tokenizer_file, retriever_tokenizer_file, **fields)
    converted = from_hugging_face(tmp_path, pair)
    before = retriever_of(converted)
    jax.tree.map(np.testing.assert_array_equal, before, retriever_of(pair))

    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    lines = gin_file.read_text(encoding="utf-8").splitlines()
    own = ("ReaderConfig", "RetrieverConfig", "ModelConfig")  # the folders say these
    gin_file.write_text("\n".join(one for one in lines if not one.startswith(own)), "utf-8")

    def run(name: str, steps: int) -> Path:
        told = (
            f"ModelConfig.reader='{pair}'", f"ModelConfig.retriever='{converted}'",
            f"TrainConfig.model_dir='{tmp_path / name}'", f"TrainConfig.total_steps={steps}",
            f"StepConfig.retriever_training='{training}'", *BINDINGS,
        )  # fmt: skip
        if training == "query_side":
            told = tuple(one for one in told if "Refresh" not in one)
        assert main([f"--gin_file={gin_file}", *(f"--gin.{one}" for one in told)]) == 0
        return tmp_path / name

    whole = run("whole", 2)
    after = retriever_of(whole / "final")
    if training == "query_side":
        run("parts", 1)  # and started again:
        parts = run("parts", 2)
        jax.tree.map(np.testing.assert_array_equal, after, retriever_of(parts / "final"))
    rows = [row for row in read_metrics(whole) if "train/retriever_loss" in row]
    assert all(row["train/retriever_loss"] > 0 and row["train/skipped"] == 0 for row in rows)
    assert rows[-1]["train/index_version"] == (1 if training == "joint" else 0)

    config = load_config(whole / "final", "retriever")
    assert (config["encoder"], config["encoder_options"]) == (encoder, ENCODERS[encoder])
    if training == "joint":
        assert set(after) == set(before)
        assert all(np.any(after[path] != before[path]) for path in before if "kernel" in path)
        return
    for path, leaf in before.items():  # the index's tower stays, the query's moves
        rest = path.removeprefix("encoder/")
        np.testing.assert_array_equal(after[f"passage_encoder/{rest}"], leaf)
        if "kernel" in path:
            assert np.any(after[f"query_encoder/{rest}"] != leaf)
