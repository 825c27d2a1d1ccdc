"""The index of a run is kept fresh: the meter calls for refreshes, checkpoints hold slices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core import partitioning
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.index.placement import embeddings_layout
from atlas_jax.train import main as train_main
from atlas_jax.training.checkpoint import Checkpointer
from atlas_jax.training.config import CheckpointConfig
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import write_run


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["exact", "scann"])
def test_the_meter_calls_for_a_refresh_below_its_threshold(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path, searcher: str
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    bindings = {
        "TrainConfig.model_dir": tmp_path / "run",
        "TrainConfig.total_steps": 5,
        "EvalConfig.file": "''",
        "StepConfig.retriever_training": "joint",
        "CorpusConfig.searcher": searcher,
        "retriever/OptimizerConfig.learning_rate": 0.3,  # one step turns everything over
        "retriever/OptimizerConfig.schedule": "constant",
        "retriever/OptimizerConfig.frozen_steps": 2,
        "StalenessConfig.every": 1,
        "StalenessConfig.k": 4,
        "StalenessConfig.refresh_below": 0.95,
    }
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    assert train_main([f"--gin_file={gin_file}", *flags]) == 0
    rows = read_metrics(tmp_path / "run")
    measured = [row for row in rows if "index/drift" in row]
    assert [row["step"] for row in measured] == [2, 3, 4, 5]
    # Two frozen steps change nothing; then each step makes the index stale, and it is refreshed.
    assert [row["index/stale_recall@4"] for row in measured[:2]] == [1, 1]
    assert max(row["index/drift"] for row in measured[:2]) < 1e-5
    for row in measured[2:]:
        assert row["index/stale_recall@4"] < 0.95 and row["index/drift"] > 0.1
    assert [row["index/refreshed"] for row in measured] == [0, 0, 1, 1]
    assert [row["index/oldest_row"] for row in measured] == [1, 2, 3, 1]
    versions = [row["train/index_version"] for row in rows if "train/index_version" in row]
    assert versions == [0, 0, 0, 1, 2]


def test_embeddings_of_a_checkpoint_come_back_on_other_devices(tmp_path: Path) -> None:
    layouts = [
        embeddings_layout(
            200, 4, "bfloat16", partitioning.make_mesh(MeshConfig(), jax.devices()[:devices])
        )
        for devices in (8, 1, 2)
    ]
    assert [layout.shape for layout in layouts] == [(1024, 4), (256, 4), (256, 4)]
    values = np.zeros((1024, 4), jnp.bfloat16)
    values[:200] = np.arange(800).reshape(200, 4)
    saver = Checkpointer(tmp_path, CheckpointConfig())
    state = {"step": jnp.int32(3)}
    saver.save(3, state, {}, index=jax.device_put(values, layouts[0].sharding))
    saver.save(4, state, {})  # and a later one that holds none
    for layout in layouts:
        found = saver.restore_index(3, layout)
        assert found.sharding.is_equivalent_to(layout.sharding, 2)
        np.testing.assert_array_equal(np.asarray(found)[:200], values[:200])
        assert not np.asarray(found)[200:].any()
