"""Contrastive pretraining of the retriever on the passages of a store.

A pair is two crops of one passage. For supervised fine-tuning it is a task's query and its gold
passage, with hard negatives if wanted.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Array, Params
from atlas_jax.corpus.opening import open_store
from atlas_jax.index.embed import longest_of
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import (
    boxed_retriever,
    expectations,
    initial_retriever,
    load_tokenizers,
    open_retriever,
)
from atlas_jax.models.expects import Expects
from atlas_jax.models.folder import ModelPart, save_model
from atlas_jax.retriever.contrastive import crop_pair, crop_width
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import FINAL, RetrieverTrainConfig
from atlas_jax.training.contrastive_step import (
    ContrastiveState,
    make_contrastive_state,
    make_contrastive_step,
)
from atlas_jax.training.loop import Loop, run_loop
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.query_pairs import Share, query_pairs
from atlas_jax.training.run import RetrieverRun
from atlas_jax.training.speed import Speed, Uses, contrastive_flops
from atlas_jax.training.state import moment_shardings

_CROP_STREAM = 1  # folded into the step's key, so that crops and dropout differ


def train_retriever(told: RetrieverRun) -> ContrastiveState:
    """Train until `total_steps`; continue from the run's last checkpoint if there is one.

    At the end the model folder `model_dir/final` is written; it holds only the retriever.

    Raises:
      UserError: a setting or file at fault, or a checkpoint of another model.
    """
    config = told.train
    directory = check_output_folder(config.model_dir, "RetrieverTrainConfig.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        model, tokenizer = open_retriever(told.models)
        tokenizers = load_tokenizers(told.models.config)
        store = open_store(told.corpus, tokenizers)
        store.check_vocab(retriever=model.config.vocab_size)
        shapes, begin, step_fn = _make(model, told, mesh, rules)
        rows = batch_sharding("RetrieverTrainConfig.batch_size", config.batch_size, mesh, rules)
        share = Share.of(rows, config)
        if told.task:
            batches = query_pairs(store, tokenizers, told, share)
        else:
            batches = _rows(store, config, share)

        settings = {
            "RetrieverTrainConfig.batch_size": config.batch_size,
            "RetrieverTrainConfig.seed": config.seed,
            "RetrieverTrainConfig.group": config.group,
            "CorpusConfig.store": f"{store.directory.name}, {store.retriever_hash[:12]}",
        }
        if told.task:
            settings["RetrieverTrainConfig.file"] = file_mark(config.file)
        expects = told.taught(expectations(told.models.config), store.config)
        length = longest_of(store.retriever_tokens_nm)

        def place(pair: tuple[Array | None, np.ndarray]) -> tuple[Any, ...]:
            queries, passage_rows = pair
            passages = store.retriever_tokens_nm[passage_rows, :length]
            return (
                multihost.place_rows(queries, rows, config.batch_size),
                multihost.place_rows(passages, rows, config.passages_in_batch),
            )

        def export(state: ContrastiveState) -> None:
            _export(directory / FINAL, model, state, tokenizer, expects, told)

        state: ContrastiveState = run_loop(
            Loop(
                directory=directory,
                total_steps=config.total_steps,
                log_every=config.log_every,
                step=step_fn,
                batches=batches,
                place=place,
                shapes=shapes,
                begin=begin,
                settings=settings,
                checkpoints=told.checkpoints,
                profile=told.profile,
                text=told.text or as_gin(told),
                speed=functools.partial(_speed, told, model.config.tower.uses),
                export=export,
            )
        )
    return state


def _speed(
    told: RetrieverRun, uses: Uses, state: ContrastiveState, queries: Array | None, passages: Array
) -> Speed:
    """Turns a step's time into rates; without queries the passages are cropped twice."""
    contrastive = told.contrastive
    if queries is None:
        crops = passages.shape[0] * crop_width(passages.shape[1], contrastive)
        tokens = (crops, crops)
    else:
        tokens = (queries.size, passages.size)
    slow = bool(contrastive.momentum)
    flops = contrastive_flops(state.params, *tokens, slow, uses)
    counts = {"tokens": sum(tokens), "pairs": told.train.batch_size}
    return Speed(flops, counts, told.profile)


def _make(
    model: DualEncoder,
    told: RetrieverRun,
    mesh: Mesh,
    rules: tuple[Rule, ...],
) -> tuple[ContrastiveState, Callable[[], ContrastiveState], CompiledOnce]:
    """The state's shapes, what makes it, and its step.

    Parameters and their moments lie as in `train`, those of the momentum encoder as the
    retriever's. The queue lies over all devices.
    """
    config, contrastive = told.train, told.contrastive
    optimizer = make_optimizer(told.optimizer)

    def fresh(params: Params) -> ContrastiveState:
        return make_contrastive_state(model, params, contrastive, optimizer, config.seed)

    boxed, everywhere = boxed_retriever(model), partitioning.replicated(mesh)
    params, specs = meta.unbox(boxed), partitioning.param_shardings(boxed, mesh, rules)
    shapes = jax.eval_shape(fresh, params)
    shardings = jax.tree.map(lambda _: everywhere, shapes).replace(
        params=specs,
        key_params=None if shapes.key_params is None else specs,
        opt_state=moment_shardings(shapes.opt_state, params, specs, everywhere),
    )
    if contrastive.queue_size and contrastive.queue_size % partitioning.index_parts(mesh) == 0:
        over_all = NamedSharding(mesh, partitioning.logical_to_spec(("index", None), rules))
        shardings = shardings.replace(queue=shardings.queue.replace(keys_me=over_all))

    def begin() -> ContrastiveState:
        params = initial_retriever(told.models.config, model, config.seed, specs)
        state: ContrastiveState = jax.jit(fresh, out_shardings=shardings)(params)
        return state

    step = make_contrastive_step(model, contrastive, optimizer)

    def cropped(
        state: ContrastiveState, _: None, tokens_bl: jax.Array
    ) -> tuple[ContrastiveState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        pair = crop_pair(jax.random.fold_in(key, _CROP_STREAM), tokens_bl, contrastive)
        return step(state, *pair)

    compiled = jax.jit(
        step if config.task else cropped,
        donate_argnums=0,
        out_shardings=(shardings, everywhere),
    )
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
    once = CompiledOnce(
        compiled,
        *("state", "queries", "passages"),
        smaller="RetrieverTrainConfig.batch_size (BATCH_SIZE)",
    )
    return shapes, begin, once


def _rows(store: PassageStore, config: RetrieverTrainConfig, share: Share) -> Any:
    """Endless (None, store rows), shuffled anew each epoch; the iterator has a state."""
    if config.batch_size > store.count:
        raise UserError(
            f"RetrieverTrainConfig.batch_size = {config.batch_size} is more than the "
            f"{store.count} passages of {store.directory}; a passage would be its own negative"
        )
    mine = np.asarray(share.passages)
    rows = grain.MapDataset.range(store.count).seed(config.seed).shuffle().repeat()
    batches = rows.batch(
        config.batch_size, drop_remainder=True, batch_fn=lambda rows: (None, np.stack(rows)[mine])
    )
    return iter(batches.to_iter_dataset())


def _export(
    directory: Path,
    model: DualEncoder,
    state: ContrastiveState,
    tokenizer: Tokenizer,
    expects: Expects,
    told: RetrieverRun,
) -> None:
    part = ModelPart(dataclasses.asdict(model.config), state.params, tokenizer)
    about = {"steps": int(state.step), "skipped": int(state.skipped)}
    save_model(directory, {"retriever": part}, told.models.config.export_dtype, about, expects)
