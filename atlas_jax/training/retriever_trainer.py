"""Contrastive pretraining of the retriever on the passages of a store."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import partitioning
from atlas_jax.core.config import dump_config
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.retriever.contrastive import ContrastiveConfig, crop_pair
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.assembly import (
    active_mesh,
    batch_sharding,
    load_retriever,
    load_tokenizers,
)
from atlas_jax.training.checkpoint import Checkpointer, ModelPart, save_model
from atlas_jax.training.config import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINAL,
    CheckpointConfig,
    CorpusConfig,
    ModelConfig,
    RetrieverTrainConfig,
)
from atlas_jax.training.contrastive_step import (
    ContrastiveState,
    make_contrastive_state,
    make_contrastive_step,
)
from atlas_jax.training.corpus import open_store
from atlas_jax.training.metrics import RunLog
from atlas_jax.training.optimizers import OptimizerConfig, make_optimizer

_CROP_STREAM = 1  # folded into the step's key, so that crops and dropout differ

Step = Callable[[ContrastiveState, jax.Array], tuple[ContrastiveState, dict[str, jax.Array]]]


def train_retriever(config: RetrieverTrainConfig) -> ContrastiveState:
    """Train until `total_steps`, going on from the run's last checkpoint if there is one.

    Reads ModelConfig, CorpusConfig, ContrastiveConfig, CheckpointConfig and
    retriever/OptimizerConfig from gin. Ends with the model folder `model_dir/final`, which
    holds the retriever alone.

    Raises:
      UserError: any of them at fault, or a checkpoint of another model.
    """
    directory, saving = Path(config.model_dir), CheckpointConfig()
    with active_mesh() as (mesh, rules):
        model_config = ModelConfig()
        model, params, tokenizer = load_retriever(model_config, config.seed)
        store = open_store(CorpusConfig(), load_tokenizers(model_config))
        state, step_fn = _make(model, params, config.seed, mesh, rules)
        batches = _batches(store, config)
        rows = batch_sharding("RetrieverTrainConfig.batch_size", config.batch_size, mesh, rules)

        checkpoints = Checkpointer(directory / CHECKPOINTS, saving)
        found = checkpoints.restore(state)
        if found is not None:
            state = found.state
            batches.set_state(found.notes["data"])
        dump_config(directory / CONFIG_FILE)
        first = int(state.step)
        length = _longest(store)
        with RunLog(directory, first, config.total_steps) as log:
            for step in range(first + 1, config.total_steps + 1):
                tokens_bl = store.retriever_tokens_nm[next(batches), :length]
                state, metrics = step_fn(state, jax.device_put(tokens_bl, rows))
                log.advance()
                if step % config.log_every == 0 or step == config.total_steps:
                    log.write(step, "train", jax.device_get(metrics))
                if step == config.total_steps or (saving.every and step % saving.every == 0):
                    checkpoints.save(step, state, {"data": batches.get_state()})
        checkpoints.close()
        _export(directory / FINAL, model, state, tokenizer, model_config.export_dtype)
    return state


def _make(
    model: DualEncoder, params: Any, seed: int, mesh: Mesh, rules: tuple[Rule, ...]
) -> tuple[ContrastiveState, Step]:
    """The state, everywhere but for the queue, which lies over all devices; and its step."""
    contrastive = ContrastiveConfig()
    with gin.config_scope("retriever"):
        optimizer = make_optimizer(OptimizerConfig())
    state = make_contrastive_state(model, params, contrastive, optimizer, seed)
    everywhere = partitioning.replicated(mesh)
    shardings = jax.tree.map(lambda _: everywhere, state)
    if contrastive.queue_size and contrastive.queue_size % mesh.size == 0:
        over_all = NamedSharding(mesh, partitioning.logical_to_spec(("index", None), rules))
        shardings = dataclasses.replace(
            shardings, queue=dataclasses.replace(shardings.queue, keys_me=over_all)
        )
    step = make_contrastive_step(model, contrastive, optimizer)

    def cropped(
        state: ContrastiveState, tokens_bl: jax.Array
    ) -> tuple[ContrastiveState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        pair = crop_pair(jax.random.fold_in(key, _CROP_STREAM), tokens_bl, contrastive)
        return step(state, *pair)

    compiled = jax.jit(cropped, donate_argnums=0, out_shardings=(shardings, everywhere))
    return jax.device_put(state, shardings), compiled


def _batches(store: PassageStore, config: RetrieverTrainConfig) -> Any:
    """Endless batches of store rows, shuffled anew each epoch; the iterator has a state."""
    if config.batch_size > store.count:
        raise UserError(
            f"RetrieverTrainConfig.batch_size = {config.batch_size} is more than the "
            f"{store.count} passages of {store.directory}; a passage would be its own negative"
        )
    rows = grain.MapDataset.range(store.count).seed(config.seed).shuffle().repeat()
    return iter(rows.batch(config.batch_size).to_iter_dataset())


def _longest(store: PassageStore) -> int:
    """Columns of the store's retriever tokens that hold any, so that no step computes padding."""
    used_m = np.zeros(store.retriever_tokens_nm.shape[1], bool)
    for start in range(0, store.count, 65536):
        used_m |= (store.retriever_tokens_nm[start : start + 65536] != 0).any(axis=0)
    return int(used_m.nonzero()[0].max()) + 1


def _export(
    directory: Path,
    model: DualEncoder,
    state: ContrastiveState,
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    part = ModelPart(dataclasses.asdict(model.config), state.params, tokenizer)
    about = {"steps": int(state.step), "skipped": int(state.skipped)}
    save_model(directory, {"retriever": part}, dtype=dtype, about=about)
