"""A run that goes on reads its checkpoint alone, each device its part of it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.training import trainer
from tests.device_bytes import device_bytes, most_bytes
from tests.training.runs import write_run


@pytest.mark.slow
def test_a_run_goes_on_without_the_parameters_that_it_began_with(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    model, mesh = tmp_path / "model", ["MeshConfig.data=1", "MeshConfig.fsdp=4"]
    load_gin([str(gin_file)], [*mesh, "MeshConfig.model=2"])
    with use_devices(from_gin.devices()) as (made_on, rules):
        made = assemble(from_gin.models(), made_on, rules)
        export_model(model, made.models, made.params, made.tokenizers, "float32", {})
    of_folder = [f"ModelConfig.{part}='{model}'" for part in ("reader", "retriever")]
    bindings = [
        *(*mesh, "MeshConfig.model=2", *of_folder),
        *(f"ModelConfig.{part}_tokenizer=''" for part in ("reader", "retriever")),
        f"TrainConfig.model_dir='{tmp_path}/run'",
        "TrainConfig.total_steps=10",
        "TrainConfig.passages='none'",
        "StepConfig.retriever_training='fixed'",
        "EvalConfig.file=''",
        "ReaderConfig.scan_layers=True",
    ]
    load_gin([str(gin_file)], bindings)
    told = from_gin.train_run()
    with use_devices(told.devices) as (made_on, rules):
        run = trainer._prepare(told, made_on, rules)
        state, most = most_bytes(lambda: trainer._begin_or_resume(run))
        both = device_bytes(state) + device_bytes(state.params)  # moments are made beside them
        assert most <= max(both.values()) + 64  # and a key
        trainer._save(run, 7, state)
        run.checkpoints.close()

        for part in ("reader", "retriever"):
            (model / f"{part}.safetensors").unlink()
        again = trainer._prepare(told, made_on, rules)
        restored, most = most_bytes(lambda: trainer._begin_or_resume(again))
        assert most <= max(device_bytes(state).values())
        jax.tree.map(np.testing.assert_array_equal, state, restored)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        with pytest.raises(UserError, match="lacks reader.safetensors"):
            again.begin()
        again.checkpoints.close()
