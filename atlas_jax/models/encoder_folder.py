"""An encoder with its heads in a model folder: loaded, given further heads, saved.

The folder is one of `models.folder` with a part named "encoder". Whatever reads a text and says
something of its tokens or of the whole begins here: pretraining, classifiers, prompts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from atlas_jax.core.deltas import merge_lora, split_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import as_path
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.encoders.model import EncoderModel, EncoderModelConfig
from atlas_jax.models.config import MODEL_CONFIGS
from atlas_jax.models.expects import NOTHING, Expects
from atlas_jax.models.folder import ModelPart, load_model, save_model
from atlas_jax.models.folder_config import read_folder_config
from atlas_jax.models.matching import check_params
from atlas_jax.models.partial import Base
from atlas_jax.retriever.dual_encoder import is_tied

PART = "encoder"
_FIELDS = frozenset(field.name for field in dataclasses.fields(EncoderModelConfig))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder, the heads on it, and its tokenizer.

    Attributes:
      config: kind and sizes of the encoder, names of the heads.
      params: {"encoder": ..., and each head by its name}, float32 arrays on the host.
      tokenizer: text to tokens.
      deltas, base: adapters or LoRA among the parameters and what a partial folder stands on, as
        in `ModelPart`.
    """

    config: EncoderModelConfig
    params: Params
    tokenizer: Tokenizer
    deltas: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    base: Base | None = None

    @property
    def model(self) -> EncoderModel:
        """The module whose parameters these are."""
        return EncoderModel(self.config)

    @property
    def part(self) -> ModelPart:
        """What `models.folder.save_model` writes."""
        fields = dataclasses.asdict(self.config)
        return ModelPart(fields, self.params, self.tokenizer, self.deltas, self.base)


def load_encoder(
    directory: str | Path, heads: Sequence[str] = (), base: str = "", **fields: Any
) -> Encoder:
    """Read an encoder from a model folder; of a retriever's folder the one tower, without heads.

    Args:
      directory: of the folder.
      heads: those that it must have; it keeps the others, too.
      base: where the base of a partial encoder lies now, as in `load_model`.
      fields: of `EncoderModelConfig`, in place of the folder's: dropout_rate, dtype...

    Raises:
      UserError: as `load_model`; or a head is absent, the folder has neither an encoder nor a
        retriever of one tower, or a field does not fit the parameters.
    """
    has = read_folder_config(as_path(directory)).models
    name = PART if PART in has else "retriever"
    if name not in has:
        raise UserError(
            f"model folder {directory} has no encoder; it has {', '.join(has) or 'none'}"
        )
    part = load_model(directory, (name,), {name: base} if base else {})[name]
    saved, params = dict(part.config), part.params
    if name == "retriever":
        if not is_tied(split_delta(params)[0]):
            raise UserError(
                f"model folder {directory}: its retriever has two towers, and only one can be an "
                "encoder"
            )
        saved = {key: saved[key] for key in _FIELDS if key in saved}
    config = MODEL_CONFIGS[PART](**{**saved, **fields})
    _check_heads(config, heads, directory)
    own, _ = split_delta(params)
    check_params(own, _shapes(config), f"{directory} ({name})")
    deltas = {path.replace(name, PART, 1): one for path, one in part.deltas.items()}
    return Encoder(config, params, part.tokenizer, deltas, part.base)


def merged(encoder: Encoder) -> Encoder:
    """The encoder with its LoRA added to the kernels, as a plain one that stands on no base.

    Raises:
      UserError: it has adapters, which cannot be merged.
    """
    params = merge_lora(encoder.params)
    return dataclasses.replace(encoder, params=params, deltas={}, base=None)


def save_encoder(
    directory: str | Path,
    encoder: Encoder,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    expects: Expects = NOTHING,
) -> None:
    """Write an encoder as a model folder of its own, see `save_model`.

    Raises:
      UserError: the folder could not be written.
    """
    save_model(directory, {PART: encoder.part}, dtype, about, expects)


def with_heads(
    encoder: Encoder, heads: Sequence[str], seed: int = 0, num_classes: int = 0
) -> Encoder:
    """The encoder with these heads beside those that it has; what is missing is drawn.

    What there is keeps its values, but for a sentence head of another number of classes. An
    encoder without any parameters is drawn whole.

    Args:
      encoder: to begin with.
      heads: names of `encoders.heads.HEADS`.
      seed: of what is drawn.
      num_classes: of the sentence head; 0 = as it is.

    Raises:
      UserError: an unknown head.
    """
    config = encoder.config
    names = tuple(dict.fromkeys((*config.heads, *heads)))
    kept = dict(encoder.params)
    if num_classes and num_classes != config.num_classes:
        kept.pop("sentence", None)
    classes = num_classes or config.num_classes
    config = dataclasses.replace(config, heads=names, num_classes=classes)
    if set(kept) != {PART, *names}:
        drawn = draw_encoder(config, seed)
        kept = {name: kept.get(name, value) for name, value in drawn.items()}
    return dataclasses.replace(encoder, config=config, params=kept)


def draw_encoder(config: EncoderModelConfig, seed: int = 0) -> Params:
    """Fresh parameters of an encoder and its heads, on the host."""
    init = jax.jit(lambda key: initial_params(config, key))
    drawn: Params = jax.tree.map(np.asarray, init(jax.random.key(seed)))
    return drawn


def boxed_shapes(config: EncoderModelConfig) -> Params:
    """Shapes of all parameters, boxed with their logical axes; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    boxed = jax.eval_shape(EncoderModel(config).init, jax.random.key(0), tokens)
    params: Params = boxed["params"]
    return params


def initial_params(config: EncoderModelConfig, key: jax.Array) -> Params:
    """Fresh parameters of an encoder and its heads; to be jitted, with shardings on a mesh."""
    variables = EncoderModel(config).init(key, jnp.ones((1, 4), jnp.int32))
    params: Params = meta.unbox(variables["params"])
    return params


def _shapes(config: EncoderModelConfig) -> Params:
    shapes: Params = meta.unbox(boxed_shapes(config))
    return shapes


def _check_heads(config: EncoderModelConfig, heads: Sequence[str], directory: str | Path) -> None:
    absent = [head for head in heads if head not in config.heads]
    if absent:
        raise UserError(
            f"model folder {directory}: its encoder has no {absent[0]} head; it has "
            f"{', '.join(config.heads) or 'none'}"
        )
