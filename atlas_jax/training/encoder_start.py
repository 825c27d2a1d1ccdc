"""What a run of an encoder on a task begins with, and what it leaves."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from atlas_jax.core import trees
from atlas_jax.core.deltas import DeltaConfig, folded, new_delta, rows_of, trained, with_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import as_path
from atlas_jax.core.types import Params
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.models.encoder_folder import (
    PART,
    Encoder,
    boxed_shapes,
    load_encoder,
    save_encoder,
    with_heads,
)
from atlas_jax.models.folder import base_of, read_about
from atlas_jax.models.folder_config import read_folder_config
from atlas_jax.tasks.classification import ClassificationTask


@dataclasses.dataclass(frozen=True)
class Start:
    """An encoder as a run begins with it.

    Attributes:
      encoder: with the heads that the run needs, without new adapters or LoRA.
      delta: the adapters or LoRA beside it; kind 'none' for none.
      boxed: shapes of all parameters with their logical axes, adapters included.
      known: paths that the folder has.
      rows_pe: what the vectors of a new prompt begin as; None where they are drawn.
    """

    encoder: Encoder
    delta: DeltaConfig
    boxed: Params
    known: frozenset[str]
    rows_pe: np.ndarray | None = None

    @property
    def soft(self) -> int:
        """The vectors of the prompt."""
        return self.delta.length if self.delta.kind == "prompt" else 0

    @property
    def has_delta(self) -> bool:
        """Whether the folder has the adapters or LoRA already."""
        return bool(trained(self.encoder.params))

    @property
    def shapes(self) -> Params:
        """Shapes of all parameters."""
        unboxed: Params = meta.unbox(self.boxed)
        return unboxed

    def small(self, key: jax.Array) -> Params:
        """New adapters or LoRA; an empty tree without any. Can be traced."""
        small = fresh_delta(self.encoder.config, self.delta, key)
        if self.rows_pe is None:
            return small
        rows = jnp.asarray(self.rows_pe)
        return {PART: {"embeddings": {"word_embeddings": {"prompt": {"table": rows}}}}}

    def params(self, seed: int) -> Params:
        """The parameters of step 0, on the host."""
        own = self.encoder.params
        if self.has_delta or self.delta.kind == "none":
            return own
        small = jax.jit(self.small)(jax.random.key(seed))
        return with_delta(own, jax.tree.map(np.asarray, small))


def fresh_delta(config: EncoderModelConfig, delta: DeltaConfig, key: jax.Array) -> Params:
    """Adapters or LoRA for an encoder, drawn by `key`; an empty tree for kind 'none'."""
    if delta.kind == "none":
        return {}
    small: Params = meta.unbox(new_delta(boxed_shapes(config), delta, key))
    return small


def open_start(
    folder: str,
    base: str,
    fields: Mapping[str, Any],
    told: DeltaConfig,
    head: str,
    classes: int,
    task: str,
    seed: int,
    trains: bool,
) -> Start:
    """Read an encoder for a task.

    Args:
      folder, base: as in `load_encoder`.
      fields: of `EncoderModelConfig`, in place of the folder's.
      told: adapters or LoRA that the run adds.
      head: 'mlm', which has to be there; 'sentence', which is drawn for a run that trains it; or
        ''. A
        classifier of the same task is kept. Of one of another task the pooler is kept.
      classes: of the task.
      task: its name.
      seed: of what is drawn.
      trains: whether the run trains.

    Raises:
      UserError: as `load_encoder`; a classifier that does not fit the task; other adapters than the
        folder's; or experts that would train.
    """
    wanted = (head,) if head and (head == "mlm" or not trains) else ()
    encoder = load_encoder(folder, wanted, base, **fields)
    tower: Any = encoder.config.tower
    if trains and tower.num_experts:
        raise UserError(
            f"the encoder of {folder} has {tower.num_experts} experts, which only pretrain_encoder "
            "trains: here nothing would keep them balanced"
        )
    known = frozenset(traverse_util.flatten_dict(encoder.params, sep="/"))
    if head == "sentence":
        encoder, kept = _classifier(encoder, folder, classes, task, seed, trains)
        known = known if kept else frozenset(p for p in known if not p.startswith("sentence/cl"))
    delta = delta_of(encoder, folder, told)
    boxed = boxed_shapes(encoder.config)
    if delta.kind != "none":
        key = jax.eval_shape(lambda: jax.random.key(0))
        small = jax.eval_shape(lambda key: new_delta(boxed, delta, key), key)
        boxed = with_delta(boxed, small)
        encoder = dataclasses.replace(encoder, deltas={PART: dataclasses.asdict(delta)})
    return Start(encoder, delta, boxed, known, _rows(encoder, delta, seed))


def _rows(encoder: Encoder, delta: DeltaConfig, seed: int) -> np.ndarray | None:
    """The rows of the token table that a new prompt begins as, if it does."""
    if not delta.begins_as_rows:
        return None
    vocab_size = encoder.config.vocab_size
    ids_pw, weights_pw = delta.rows(encoder.tokenizer.encode_batch, vocab_size, seed)
    table_ve = encoder.params[PART]["embeddings"]["word_embeddings"]["embedding"]
    return np.asarray(rows_of(table_ve, ids_pw, weights_pw))


def for_task(delta: DeltaConfig, task: ClassificationTask) -> DeltaConfig:
    """A delta as it begins for a task: the first vectors of a prompt as the labels' words."""
    if not delta.begins_as_rows or delta.words:
        return delta
    words = [word for own in task.verbaliser.words.values() for word in own]
    return dataclasses.replace(delta, words=words)


def _classifier(
    encoder: Encoder, folder: str, classes: int, task: str, seed: int, trains: bool
) -> tuple[Encoder, bool]:
    """The encoder with a classifier for the task, and whether it is the folder's own."""
    saved = read_about(folder).get("task")
    has = "sentence" in encoder.config.heads
    if not trains and (encoder.config.num_classes != classes or saved not in (None, task)):
        raise UserError(
            f"model folder {folder}: its classifier is one of {encoder.config.num_classes} "
            f"classes{f' for {saved}' if saved else ''}, but {task} has {classes}; train one "
            "(ClassifierTrainConfig.total_steps)"
        )
    if not trains or (has and saved == task and encoder.config.num_classes == classes):
        return encoder, True
    pooler = encoder.params["sentence"]["pooler"] if has else None
    bare = {name: value for name, value in encoder.params.items() if name != "sentence"}
    drawn = with_heads(dataclasses.replace(encoder, params=bare), ("sentence",), seed, classes)
    if pooler is not None:
        head = {**drawn.params["sentence"], "pooler": pooler}
        drawn = dataclasses.replace(drawn, params={**drawn.params, "sentence": head})
    return drawn, False


def delta_of(encoder: Encoder, folder: str, told: DeltaConfig) -> DeltaConfig:
    """The adapters or LoRA that the folder has, or else those that were told."""
    if not encoder.deltas:
        return told
    saved = DeltaConfig(**encoder.deltas[PART])
    if told.kind != "none" and told != saved:
        raise UserError(
            f"encoder/DeltaConfig is {told}, but the encoder of {folder} has {saved}; leave the "
            "bindings out to go on with it"
        )
    return saved


def export_encoder(
    directory: Path,
    start: Start,
    params: Params,
    patterns: Sequence[str],
    folder: str,
    base: str,
    about: Mapping[str, Any],
) -> None:
    """Write the trained encoder: what trained, and what the folder lacked, on top of the folder.

    An encoder that trained as a whole, and one that began as a retriever, is written whole. Of a
    prompt's or prefix's network what it gives is written alone.
    """
    moving, frozen = trees.split(params, patterns)
    params, delta = folded(params, start.delta)
    deltas = {PART: dataclasses.asdict(delta)} if start.encoder.deltas else {}
    encoder = dataclasses.replace(start.encoder, params=params, deltas=deltas, base=None)
    if frozen.get(PART) and PART in read_folder_config(as_path(folder)).models:
        below, beyond = base_of(folder, PART, base)
        flat = traverse_util.flatten_dict(params, sep="/")
        moved = set(traverse_util.flatten_dict(moving, sep="/"))
        own = {p: x for p, x in flat.items() if p in moved or p in beyond or p not in start.known}
        encoder = dataclasses.replace(
            encoder, params=traverse_util.unflatten_dict(own, sep="/"), base=below
        )
    save_encoder(directory, encoder, about=about)


def about_task(
    task: ClassificationTask, method: str, params: Params, patterns: Sequence[str]
) -> dict[str, Any]:
    """What a trained folder says of its task, for people and for `open_start`."""
    moving, _ = trees.split(params, patterns)
    return {
        "task": task.name,
        "method": method,
        "template": task.query_format,
        "words": {str(label): list(words) for label, words in task.verbaliser.words.items()},
        "trained": trees.count(moving),
        "parameters": trees.count(params),
    }
