"""Contrastive pretraining of the retriever on the passages of a store.

A pair is two crops of one passage. For supervised fine-tuning it is a task's query and its gold
passage, with hard negatives if wanted.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from atlas_jax.answering.truncation import evenly
from atlas_jax.core import multihost, partitioning
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Array, Params
from atlas_jax.corpus.opening import open_store
from atlas_jax.index.passages import PassageStore
from atlas_jax.models.assembly import (
    Tokenizers,
    abstract_retriever,
    expectations,
    initial_retriever,
    load_tokenizers,
    open_retriever,
)
from atlas_jax.models.expects import Expects
from atlas_jax.models.folder import ModelPart, save_model
from atlas_jax.retriever.contrastive import crop_pair, crop_width
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.tasks.base import Example
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
from atlas_jax.training.run import RetrieverRun
from atlas_jax.training.speed import Speed, Uses, contrastive_flops

_CROP_STREAM = 1  # folded into the step's key, so that crops and dropout differ
_CHECKED = 100_000  # records that are checked before the first step


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
        batches = query_pairs(store, tokenizers, told) if told.task else _rows(store, config)
        rows = batch_sharding("RetrieverTrainConfig.batch_size", config.batch_size, mesh, rules)

        settings = {
            "RetrieverTrainConfig.batch_size": config.batch_size,
            "RetrieverTrainConfig.seed": config.seed,
            "RetrieverTrainConfig.group": config.group,
            "CorpusConfig.store": f"{store.directory.name}, {store.retriever_hash[:12]}",
        }
        if told.task:
            settings["RetrieverTrainConfig.file"] = file_mark(config.file)
        expects = told.taught(expectations(told.models.config), store.config)
        length = _longest(store)

        def place(pair: tuple[Array | None, np.ndarray]) -> tuple[Any, ...]:
            queries, passage_rows = pair
            passages = store.retriever_tokens_nm[passage_rows, :length]
            placed: tuple[Any, ...] = multihost.place((queries, passages), rows)
            return placed

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

    The state lies everywhere but for the queue, which lies over all devices.
    """
    config, contrastive = told.train, told.contrastive
    optimizer = make_optimizer(told.optimizer)

    def fresh(params: Params) -> ContrastiveState:
        return make_contrastive_state(model, params, contrastive, optimizer, config.seed)

    def begin() -> ContrastiveState:
        params = initial_retriever(told.models.config, model, config.seed)
        return multihost.place(fresh(params), shardings)

    shapes = jax.eval_shape(fresh, abstract_retriever(model))
    everywhere = partitioning.replicated(mesh)
    shardings = jax.tree.map(lambda _: everywhere, shapes)
    if contrastive.queue_size and contrastive.queue_size % partitioning.index_parts(mesh) == 0:
        over_all = NamedSharding(mesh, partitioning.logical_to_spec(("index", None), rules))
        shardings = dataclasses.replace(
            shardings, queue=dataclasses.replace(shardings.queue, keys_me=over_all)
        )
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


def _rows(store: PassageStore, config: RetrieverTrainConfig) -> Any:
    """Endless (None, store rows), shuffled anew each epoch; the iterator has a state."""
    if config.batch_size > store.count:
        raise UserError(
            f"RetrieverTrainConfig.batch_size = {config.batch_size} is more than the "
            f"{store.count} passages of {store.directory}; a passage would be its own negative"
        )
    rows = grain.MapDataset.range(store.count).seed(config.seed).shuffle().repeat()
    batches = rows.batch(
        config.batch_size, drop_remainder=True, batch_fn=lambda rows: (None, np.stack(rows))
    )
    return iter(batches.to_iter_dataset())


def query_pairs(store: PassageStore, tokenizers: Tokenizers, told: RetrieverRun) -> Any:
    """Endless (query tokens, rows of passages); groups of records stay together.

    The rows are first the gold passage of each query, then `hard_negatives` of the negatives of
    each. A query and its negatives depend only on the seed and the place in the stream. Records at
    the end of the file that do not fill a group are left out.
    """
    config, task, data = told.train, told.task, told.data
    assert task is not None
    records = task.load(config.file, rows=told.rows)
    groups = len(records) // config.group
    if groups * config.group < config.batch_size:
        raise UserError(
            f"RetrieverTrainConfig.batch_size = {config.batch_size} is more than the "
            f"{len(records)} records of {config.file} (in groups of {config.group})"
        )

    def examples_of(index: int, group: int) -> list[tuple[Example, list[str]]]:
        rng = np.random.Generator(np.random.Philox(key=[config.seed, index]))
        chosen = records[group * config.group : (group + 1) * config.group]
        examples = [task.example(record, rng) for record in chosen]
        return [(example, negatives(example, rng)) for example in examples]

    def negatives(example: Example, rng: np.random.Generator) -> list[str]:
        if not config.hard_negatives:
            return []
        if not example.negative_ids:
            raise UserError(
                f"{config.file}: record {example.id!r} has no field 'negatives', from which "
                f"RetrieverTrainConfig.hard_negatives = {config.hard_negatives} are drawn"
            )
        few = len(example.negative_ids) < config.hard_negatives  # then some are drawn twice
        return list(rng.choice(example.negative_ids, config.hard_negatives, replace=few))

    def tokenise(
        groups: Sequence[list[tuple[Example, list[str]]]],
    ) -> tuple[np.ndarray, np.ndarray]:
        examples, hard = zip(*itertools.chain.from_iterable(groups), strict=True)
        ids = tokenizers.retriever.encode_batch([e.retriever_text for e in examples], True)
        ids_b = [*(gold_id(e) for e in examples), *itertools.chain.from_iterable(hard)]
        rows = np.array([store.row_of(str(passage_id)) for passage_id in ids_b])
        length, side = data.retriever_query_length, data.truncate_query  # as data.Batcher has it
        return tokenizers.retriever.pad_to(ids, length, side), rows

    def gold_id(example: Example) -> str:
        if not example.gold_ids:
            raise UserError(
                f"{config.file}: record {example.id!r} names no gold passage to be paired with "
                f"(RetrieverTrainConfig.task = {config.task!r})"
            )
        return example.gold_ids[0]

    # Faulty records are found before the first step.
    for place in evenly(len(records), _CHECKED):
        example = task.example(records[place])
        store.row_of(gold_id(example))
        for passage_id in negatives(example, np.random.default_rng(0)):
            store.row_of(str(passage_id))
    stream = grain.MapDataset.range(groups).seed(config.seed).shuffle().repeat()
    # The stream has no end, so nothing is dropped; but its length, rounded up, would overflow.
    batches = stream.map_with_index(examples_of).batch(
        config.batch_size // config.group, drop_remainder=True, batch_fn=tokenise
    )
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def _longest(store: PassageStore) -> int:
    """Columns of the store's retriever tokens that are not all padding; steps use only these."""
    used_m = np.zeros(store.retriever_tokens_nm.shape[1], bool)
    for start in range(0, store.count, 65536):
        used_m |= (store.retriever_tokens_nm[start : start + 65536] != 0).any(axis=0)
    return int(used_m.nonzero()[0].max()) + 1


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
