"""Models that hold a part of their parameters and name the model that has the others.

What a run trained of a model stands on that same model: adapters, LoRA, whatever
`StepConfig.train` named. A reader with a pair encoder may also stand on the retriever that its
encoder began as: the lower layers, the tables and the tokenizer are the retriever's then.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.trees import split
from atlas_jax.core.types import Params
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.retriever.dual_encoder import is_tied, untie


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that a partial one stands on.

    Attributes:
      fingerprint: `fingerprint.model_hash` of it.
      folder: where it lay; "" = it has to be told.
      part: which model of that folder it is.
    """

    fingerprint: str
    folder: str
    part: str


def given(name: str, config: Mapping[str, Any], part: str, params: Params, end_id: int) -> Params:
    """The parameters that a model takes from its base.

    Args:
      name, config: 'reader' or 'retriever' that stands on the base, and its config's fields.
      part: which model the base is.
      params: the base's, whole.
      end_id: of the base's tokenizer.

    Raises:
      UserError: a reader that cannot stand on a retriever.
    """
    if name == part:
        # Query-side training gives each side a tower of its own.
        untied = name == "retriever" and not config.get("tied", True)
        return untie(params) if untied else params
    reader = ReaderConfig(**config)
    if (name, part) != ("reader", "retriever") or not reader.untrained:
        raise UserError(
            f"a {name} cannot stand on a {part}: only a reader with a pair encoder has parts of one"
        )
    tower = params["encoder"] if is_tied(params) else params["passage_encoder"]
    layers = {f"layers_{i}": None for i in range(reader.apart_layers)}
    begun = start_from_tower({"encoder": layers}, tower, reader, end_id)
    return split(begun, reader.untrained)[0]


def tokenizer_on(name: str, base: Base, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a model that stands on a base with this one."""
    return tokenizer if name == base.part else reader_tokenizer(tokenizer)


def over(below: Params, own: Params) -> Params:
    """A base's parameters with those of the model that stands on it, which go first."""
    flat = {
        **traverse_util.flatten_dict(below, sep="/"),
        **traverse_util.flatten_dict(own, sep="/"),
    }
    whole: Params = traverse_util.unflatten_dict(flat, sep="/")
    return whole
