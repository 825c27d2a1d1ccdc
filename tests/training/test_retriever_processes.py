"""Several local processes teach a retriever as one does; none holds more than its part."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import open_retriever
from atlas_jax.training import retriever_trainer
from atlas_jax.training.metrics import read_metrics
from tests.device_bytes import device_bytes, most_bytes
from tests.training.runs import write_lines, write_run
from tests.training.test_processes import begin, finish

MOCO = ["ContrastiveConfig.queue_size=32", "ContrastiveConfig.momentum=0.9"]
SPREAD = ["MeshConfig.data=2", "MeshConfig.fsdp=2"]


def bindings(folder: Path, *more: str) -> list[str]:
    return [
        f"RetrieverTrainConfig.model_dir='{folder}'",
        "RetrieverTrainConfig.batch_size=8",
        "RetrieverTrainConfig.total_steps=4",
        "RetrieverTrainConfig.log_every=1",
        "CheckpointConfig.every=2",
        *MOCO,
        *more,
    ]


def agree(one: Path, other: Path) -> None:
    """The same losses and the same weights, but for the order in which sums are taken."""
    rows = [read_metrics(run) for run in (one, other)]
    for name in ("train/loss", "train/accuracy", "train/grad_norm"):
        values = [[row[name] for row in run] for run in rows]
        assert len(values[0]) == 4
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4, atol=1e-6, err_msg=name)
    weights = [load_file(run / "final" / "retriever.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_teach_as_one_does(
    count: int, tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    """Two by crops of passages, four by questions with hard negatives; both go on once."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    more = [*SPREAD]
    if count == 4:
        rows = [
            {"id": f"q{i}", "question": f"which one is {i % 7}?", "answers": ["x"],
             "gold": [f"p{i % 8}"], "negatives": [f"r{i % 8}", f"p{(i + 1) % 8}"]}
            for i in range(16)
        ]  # fmt: skip
        file = write_lines(tmp_path / "gold.jsonl", rows)
        more += ["RetrieverTrainConfig.task='qa'", f"RetrieverTrainConfig.file='{file}'"]
        more += ["RetrieverTrainConfig.hard_negatives=1", "RetrieverTrainConfig.group=2"]
    runs = [tmp_path / "alone", tmp_path / "together"]
    finish(begin("train_retriever", str(gin_file), bindings(runs[0], *more), 1))
    for steps in (2, 4):
        own = bindings(runs[1], *more, f"RetrieverTrainConfig.total_steps={steps}")
        finish(begin("train_retriever", str(gin_file), own, count))
    agree(*runs)
    assert PassageStore.open(tmp_path / "store").count == 16


def test_the_state_is_made_where_it_lies(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    mesh = ["MeshConfig.data=1", "MeshConfig.fsdp=4", "MeshConfig.model=2"]
    load_gin([str(gin_file)], bindings(tmp_path / "run", *mesh))
    told = from_gin.retriever_run()
    with use_devices(told.devices) as (made_on, rules):
        model, _ = open_retriever(told.models)
        shapes, begin_state, _ = retriever_trainer._make(model, told, made_on, rules)
        state, most = most_bytes(begin_state)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        held = device_bytes(state)
        assert max(held.values()) < 0.25 * whole  # an eighth of what is large, and what is small
        assert most <= max((held + device_bytes(state.params)).values()) + 64
        for wanted, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
