"""Pretraining of an encoder on text: the objectives of BERT and its relatives."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from atlas_jax.core import multihost, partitioning, trees
from atlas_jax.core.deltas import new_delta, split_delta, with_delta
from atlas_jax.core.devices import use_devices
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import Rule, batch_sharding
from atlas_jax.core.paths import check_output_folder
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.encoders.objectives import (
    OBJECTIVES,
    TokenTables,
    generator_config,
    with_objectives,
)
from atlas_jax.models.config import whole_config
from atlas_jax.models.encoder_folder import (
    PART,
    Encoder,
    boxed_shapes,
    initial_params,
    load_encoder,
    save_encoder,
)
from atlas_jax.training.as_gin import as_gin
from atlas_jax.training.compiled_once import CompiledOnce
from atlas_jax.training.config import FINAL
from atlas_jax.training.encoder_start import Start, delta_of, export_encoder, fresh_delta
from atlas_jax.training.encoder_state import (
    EncoderState,
    abstract,
    begun,
    fresh_state,
    make_step,
    state_shardings,
    trained_patterns,
)
from atlas_jax.training.encoder_texts import (
    EncoderBatch,
    RowMaker,
    cut_chunks,
    encoder_batches,
    read_documents,
)
from atlas_jax.training.loop import Loop, run_loop
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.pretrain_config import PretrainRun
from atlas_jax.training.pretrain_loss import (
    GENERATOR,
    PretrainingLoss,
    generator_params,
    own_of_generator,
    tables_of,
)
from atlas_jax.training.pretrain_watch import CollapseWatch, lowest_loss
from atlas_jax.training.provenance import file_mark
from atlas_jax.training.speed import Speed, encoder_flops

FINAL_GENERATOR = "final_generator"  # of ELECTRA: a model folder, too
_NAME = "EncoderTrainConfig"
_GENERATOR_SEED = 1  # added to the run's, for what the generator draws
_EVAL_SEED = 0  # of the masks and pairs of the evaluation, which are always the same


def pretrain_encoder(told: PretrainRun) -> EncoderState:
    """Train until `total_steps`; continue from the run's last checkpoint if there is one.

    At the end the model folder `model_dir/final` is written. It holds the encoder and its heads,
    those that did not train included. ELECTRA's generator lies in `final_generator`.

    Raises:
      UserError: a setting or file at fault, a checkpoint of another model, or a run whose loss has
        collapsed.
    """
    config = told.train
    directory = check_output_folder(config.model_dir, f"{_NAME}.model_dir")
    with use_devices(told.devices) as (mesh, rules):
        told, encoder = _opened(told)
        loss = _loss(told, encoder)
        rows = batch_sharding(f"{_NAME}.batch_size", config.batch_size, mesh, rules)
        maker = _maker(told, encoder.tokenizer, config.file)
        mine = multihost.local_rows(rows, config.batch_size)
        shapes, begin, step = _make(told, encoder, loss, mesh, rules)
        state: EncoderState = run_loop(
            Loop(
                directory=directory,
                total_steps=config.total_steps,
                log_every=config.log_every,
                step=step,
                batches=encoder_batches(maker, config.batch_size, config.seed, mine),
                place=lambda batch: (multihost.place_rows(batch, rows, config.batch_size),),
                shapes=shapes,
                begin=begin,
                settings=_settings(told, encoder.tokenizer),
                checkpoints=told.checkpoints,
                profile=told.profile,
                text=told.text or as_gin(told),
                speed=functools.partial(_speed, told, encoder.config),
                export=functools.partial(_export, told, encoder, directory),
                evaluate=_evaluation(told, encoder, loss, rows) if config.eval_file else None,
                eval_every=config.eval_every,
                watch=_watch(told, directory),
            )
        )
    return state


def _opened(told: PretrainRun) -> tuple[PretrainRun, Encoder]:
    """The encoder to begin with, and every head that the objectives need; adapters drawn.

    Returns:
      The run with the adapters or LoRA that the folder has, if it has some; and the encoder.
    """
    config = told.train
    fields = {name: value for name, value in told.encoder.items() if name != "heads"}
    if config.encoder:
        encoder = load_encoder(config.encoder, (), config.encoder_base, **fields)
        told = dataclasses.replace(told, delta=delta_of(encoder, config.encoder, told.delta))
    else:
        made = whole_config(EncoderModelConfig, fields)
        encoder = Encoder(made, {}, Tokenizer.from_file(config.tokenizer))
    _check(told, encoder)
    # The other parameters themselves are drawn when they are needed.
    kept, made = encoder.params, with_objectives(encoder.config, config.objectives)
    if told.delta.kind != "none" and not encoder.deltas:
        small = jax.jit(functools.partial(fresh_delta, made, told.delta))
        drawn = small(jax.random.key(config.seed))
        kept = with_delta(kept, jax.tree.map(np.asarray, drawn))
        encoder = dataclasses.replace(encoder, deltas={PART: dataclasses.asdict(told.delta)})
    if made.num_classes != encoder.config.num_classes:
        kept = {name: value for name, value in kept.items() if name != "sentence"}
    return told, dataclasses.replace(encoder, config=made, params=kept, base=None)


def _boxed(told: PretrainRun, made: EncoderModelConfig) -> dict[str, Any]:
    """Shapes of the encoder, its heads and its adapters, with their logical axes."""
    boxed = boxed_shapes(made)
    if told.delta.kind != "none":
        key = jax.eval_shape(lambda: jax.random.key(0))
        small = jax.eval_shape(lambda key: new_delta(boxed, told.delta, key), key)
        boxed = with_delta(boxed, small)
    return dict(boxed)


def _patterns(told: PretrainRun, shapes: Params) -> tuple[str, ...]:
    """The paths that train."""
    if told.delta.kind == "none":
        return tuple(told.train.train) or ("*",)
    heads = dict.fromkeys(OBJECTIVES[one] for one in told.train.objectives)
    return trained_patterns(shapes, told.train.train, tuple(heads))


def _check(told: PretrainRun, encoder: Encoder) -> None:
    """Refuse an encoder or a tokenizer that cannot do what is asked."""
    config, made, tokenizer = told.train, encoder.config, encoder.tokenizer
    if tokenizer.vocab_size > made.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but "
            f"EncoderModelConfig.vocab_size is {made.vocab_size}"
        )
    for name, token in (("[MASK]", tokenizer.mask_id), ("[CLS]", tokenizer.cls_id)):
        if token is None:
            raise UserError(
                f"the encoder's tokenizer has no {name} token, which pretraining needs; "
                "train_tokenizer makes one that has it"
            )
    if config.length > made.max_length:
        raise UserError(
            f"{_NAME}.length = {config.length}, but the encoder reads {made.max_length} tokens "
            "(EncoderModelConfig.max_positions)"
        )
    least = 8 if config.pairs else 3  # special tokens, and some text
    if config.length < least:
        raise UserError(f"{_NAME}.length = {config.length}: expected {least} or more")
    if config.pairs and made.type_vocab_size < 2:
        raise UserError(
            f"{_NAME}.objectives: {config.pairs!r} tells two texts apart by token types, and "
            f"EncoderModelConfig.type_vocab_size is {made.type_vocab_size}"
        )


def _loss(told: PretrainRun, encoder: Encoder) -> PretrainingLoss:
    tokenizer = encoder.tokenizer
    assert tokenizer.mask_id is not None
    if told.masking.kind == "token":
        starts_v = np.ones(tokenizer.vocab_size, bool)
    else:
        starts_v = tokenizer.word_starts()
    tables = tables_of(starts_v, tokenizer.special_ids, tokenizer.mask_id)
    return make_loss(told, encoder.config, tables)


def make_loss(told: PretrainRun, made: EncoderModelConfig, tables: TokenTables) -> PretrainingLoss:
    """The loss of a run, for an encoder with the heads that it needs."""
    config = told.train
    return PretrainingLoss(
        made,
        told.masking,
        tables,
        config.pairs,
        "electra" in config.objectives,
        config.generator_share,
        config.replaced_weight,
        "sbo" in config.objectives,
        "unilm" in config.objectives,
        "xlnet" in config.objectives,
    )


def _maker(told: PretrainRun, tokenizer: Tokenizer, file: str) -> RowMaker:
    """What makes rows of a file's texts."""
    config = told.train
    room = config.length - (3 if config.pairs else 2)
    documents = read_documents(file, tokenizer, room, config.documents == "title", told.rows)
    halves = config.pairs == "sop" and not config.released_sop
    chunks = cut_chunks(documents, room, config.short_rate, config.seed, 2 if halves else 1)
    if not len(chunks):
        raise UserError(
            f"{file}: no text has two sentences in {room} tokens, which 'sop' orders; bind "
            f"{_NAME}.documents = 'title', a longer {_NAME}.length, or released_sop = True"
        )
    if config.pairs and not halves and len(documents.first) < 3:
        raise UserError(f"{file}: one text alone; {config.pairs!r} needs a second one to draw from")
    assert tokenizer.cls_id is not None
    return RowMaker(
        documents, chunks, config.length, config.pairs, tokenizer.cls_id, tokenizer.eos_id
    )


def _make(
    told: PretrainRun, encoder: Encoder, loss: PretrainingLoss, mesh: Mesh, rules: tuple[Rule, ...]
) -> tuple[EncoderState, Callable[[], EncoderState], CompiledOnce]:
    """The state's shapes, what makes it, and its step."""
    shapes, fresh, step = state_and_step(told, loss, mesh, rules)

    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def begin() -> EncoderState:
        return begun(fresh, _params(told, encoder, loss, where.params), where)

    smaller = f"{_NAME}.batch_size or {_NAME}.length"
    return shapes, begin, CompiledOnce(step, "state", "texts", smaller=smaller)


def _params(told: PretrainRun, encoder: Encoder, loss: PretrainingLoss, where: Params) -> Params:
    """What the run begins with, in its shards: the encoder's parameters, and what it lacks drawn.

    Args:
      where: the sharding of each parameter.
    """
    kept = {name: encoder.params[name] for name in where if name in encoder.params}
    drawn = {name: own for name, own in where.items() if name not in kept}
    small = generator_config(encoder.config, told.train.generator_share) if loss.electra else None

    def draw(key: jax.Array, generator_key: jax.Array) -> Params:
        found = dict(initial_params(encoder.config, key))
        if small is not None:
            found[GENERATOR] = own_of_generator(initial_params(small, generator_key))
        return {name: found[name] for name in drawn}

    placed = multihost.place(kept, {name: where[name] for name in kept})
    keys = (jax.random.key(told.train.seed + more) for more in (0, _GENERATOR_SEED))
    made: Params = placed | (jax.jit(draw, out_shardings=drawn)(*keys) if drawn else {})
    return made


def state_and_step(
    told: PretrainRun, loss: PretrainingLoss, mesh: Mesh, rules: tuple[Rule, ...]
) -> tuple[EncoderState, Callable[[Params], EncoderState], Any]:
    """A run's abstract state, what makes it of parameters, and its jitted step(state, rows)."""
    config, optimizer = told.train, make_optimizer(told.optimizer)
    boxed = _boxed(told, loss.config)
    if loss.electra:
        small = boxed_shapes(generator_config(loss.config, config.generator_share))
        boxed[GENERATOR] = own_of_generator(small)
    patterns = _patterns(told, meta.unbox(boxed))

    def fresh(params: Params) -> EncoderState:
        return fresh_state(params, optimizer, patterns, config.seed, f"{_NAME}.train")

    shardings = state_shardings(boxed, optimizer, patterns, mesh, rules)
    step = jax.jit(
        make_step(loss, optimizer, patterns),
        donate_argnums=0,
        out_shardings=(shardings, partitioning.replicated(mesh)),
    )
    return abstract(fresh, shardings, meta.unbox(boxed)), fresh, step


def _settings(told: PretrainRun, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the order of the rows and their content, by binding."""
    config = told.train
    names = ("batch_size", "seed", "length", "documents")
    found: dict[str, Any] = {f"{_NAME}.{name}": getattr(config, name) for name in names}
    found[f"{_NAME}.short_rate"] = str(config.short_rate)
    found[f"{_NAME}.objectives"] = ",".join(config.objectives)
    file = Path(config.file)
    mark = file_mark(config.file) if file.is_file() else config.file
    return found | {f"{_NAME}.file": mark, f"{_NAME}.tokenizer": tokenizer.content_hash[:12]}


def _evaluation(
    told: PretrainRun, encoder: Encoder, loss: PretrainingLoss, rows: NamedSharding
) -> Callable[[EncoderState, int], dict[str, float]]:
    """Losses on the evaluation file without dropout; masks and pairs are the same each time."""
    config = told.train
    quiet = dataclasses.replace(loss, deterministic=True)
    maker = _maker(told, encoder.tokenizer, config.eval_file)
    count = max(1, min(config.eval_rows, len(maker.chunks)) // config.batch_size)
    mine = multihost.local_rows(rows, config.batch_size)

    def score(params: Params, number: jax.Array, batch: EncoderBatch) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(_EVAL_SEED), number)
        value, metrics = quiet(params, key, batch)
        return {"loss": value, **metrics}

    compiled = jax.jit(score)

    def evaluate(state: EncoderState, step: int) -> dict[str, float]:
        del step
        batches = encoder_batches(maker, config.batch_size, _EVAL_SEED, mine)
        found: list[dict[str, float]] = []
        for number in range(count):
            batch = multihost.place_rows(next(batches), rows, config.batch_size)
            values = jax.device_get(compiled(state.params, np.int32(number), batch))
            found.append({name: float(value) for name, value in values.items()})
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    return evaluate


def _watch(told: PretrainRun, directory: Path) -> CollapseWatch:
    config = told.train
    before = lowest_loss(read_metrics(directory)) if multihost.is_first() else np.inf
    # Every process has to stop at the same step: the first one's number goes to all, in 1e-4 and
    # at most 1e5, which fits into the 32 bits that are sent.
    scaled = multihost.of_first(int(min(before, 1e5) * 1e4))
    return CollapseWatch(config.stop_at_jump, config.patience, config.log_every, scaled / 1e4)


def _speed(
    told: PretrainRun, config: EncoderModelConfig, state: EncoderState, batch: EncoderBatch
) -> Speed:
    moving, _ = trees.split(state.params, _patterns(told, state.params))
    tokens = int(batch.tokens_bl.size)
    flops = encoder_flops(state.params, moving, tokens, config.tower.uses)
    return Speed(flops, {"tokens": tokens, "texts": told.train.batch_size}, told.profile)


def _export(told: PretrainRun, encoder: Encoder, directory: Path, state: EncoderState) -> None:
    """Write the encoder, and ELECTRA's generator beside it."""
    config, params = told.train, dict(multihost.to_host(state.params))
    about = {
        "objectives": list(config.objectives),
        "masking": told.masking.kind,
        "length": config.length,
        "steps": int(state.step),
        "skipped": int(state.skipped),
    }
    if GENERATOR in params:
        small = generator_config(encoder.config, config.generator_share)
        generator = Encoder(small, generator_params(params), encoder.tokenizer)
        save_encoder(directory / FINAL_GENERATOR, generator, about=about)
        del params[GENERATOR]
    if not encoder.deltas:
        save_encoder(directory / FINAL, dataclasses.replace(encoder, params=params), about=about)
        return
    known = frozenset(traverse_util.flatten_dict(split_delta(encoder.params)[0], sep="/"))
    start = Start(encoder, told.delta, _boxed(told, encoder.config), known)
    patterns, base = _patterns(told, params), config.encoder_base
    export_encoder(directory / FINAL, start, params, patterns, config.encoder, base, about)
