"""Claims about invented countries, and a tiny pair that reads what a corpus says of them."""

from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices, use_devices
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.training.config import CheckpointConfig
from atlas_jax.training.self_training_config import ReaderSelfTrainingRun, SelfTrainConfig
from tests.training.runs import COUNTRIES, write_lines

READER: dict[str, Any] = {
    "vocab_size": 368, "emb_dim": 32, "num_heads": 2, "head_dim": 8, "mlp_dim": 32,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.1,
}  # fmt: skip
RETRIEVER: dict[str, Any] = {
    "vocab_size": 144, "hidden_dim": 64, "num_layers": 1, "num_heads": 2, "mlp_dim": 32,
    "max_positions": 48, "dropout_rate": 0.0,
}  # fmt: skip
WAYS = ("{0}", "{0} .", "{0} ?", "{0} :", "{0} ,", "{0} a")


def write_claims(folder: Path) -> None:
    """A passage for each country, and claims that only it can settle; one way of asking is dev."""
    passages, claims = [], []
    for number, country in enumerate(COUNTRIES):
        large = number % 2 == 0
        text = f"{country} {country} {country} {'zz zz zz' if large else 'yy yy yy'}"
        passages.append({"id": f"p{number}", "title": country, "text": text})
        for way in WAYS:
            label = "SUPPORTS" if large else "REFUTES"
            claim = {"claim": way.format(country), "label": label, "gold": [f"p{number}"]}
            claims.append({**claim, "passages": [passages[-1]]})
    order = np.random.default_rng(0).permutation(len(claims))
    dev = [one for one in claims if one["claim"].endswith("?")]
    others = [claims[row] for row in order if claims[row] not in dev]
    few = [one for one in others if one["label"] == "SUPPORTS"][:4]
    few += [one for one in others if one["label"] == "REFUTES"][:4]
    many = [{**one, "label": None} for one in others if one not in few]
    write_lines(folder / "passages.jsonl", passages)
    write_lines(folder / "few.jsonl", few)
    write_lines(folder / "many.jsonl", [{k: v for k, v in m.items() if k != "label"} for m in many])
    write_lines(folder / "dev.jsonl", dev)


def save_pair(
    folder: Path, reader_tokenizer: Path, retriever_tokenizer: Path, **retriever: Any
) -> Path:
    """Both models with random weights, in a folder; fields of the retriever can be told."""
    config = ModelConfig(
        reader_tokenizer=str(reader_tokenizer), retriever_tokenizer=str(retriever_tokenizer)
    )
    with use_devices(Devices()) as (mesh, rules):
        made = assemble(ModelSpec(config, READER, retriever or RETRIEVER), mesh, rules, seed=3)
        export_model(folder, made.models, made.params, made.tokenizers, "float32", {})
    return folder


def told(
    work: Path, name: str, every: int = 0, devices: Devices = Devices(), **fields: Any
) -> ReaderSelfTrainingRun:
    """A short run on the pair in `work/pair`; the retriever finds passages by their titles."""
    config = SelfTrainConfig(
        **{
            "model_dir": str(work / name), "task": "fever", "file": str(work / "few.jsonl"),
            "unlabelled_file": str(work / "many.jsonl"), "eval_file": str(work / "dev.jsonl"),
            "teacher_steps": 2, "rounds": 1, "kd_steps": 2, "meta_steps": 2, "tune_steps": 1,
            "batch_size": 8, "unlabelled_batch_size": 8, "meta_batch_size": 8,
            "eval_batch_size": 8, "teacher_learning_rate": 1e-2, "student_learning_rate": 1e-2,
            "log_every": 1, **fields,
        }
    )  # fmt: skip
    corpus = CorpusConfig(passages=str(work / "passages.jsonl"), store=str(work / "store"))
    return ReaderSelfTrainingRun.from_folder(
        work / "pair",
        config,
        corpus,
        delta=DeltaConfig(kind="adapter", rank=16),
        task=FeverTask(answer_by="likelihood", query_format="{claim}"),
        formats={"reader_length": 40, "retriever_length": 16, "retriever_format": "{title}"},
        step={"k": 1, "reader_length": 64},
        data={"query_length": 16, "retriever_query_length": 16, "target_length": 8},
        checkpoints=CheckpointConfig(every=every, keep=30),
        devices=devices,
    )
