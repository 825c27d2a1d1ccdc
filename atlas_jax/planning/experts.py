"""What the experts of a run's Switch layers have room for."""

import dataclasses
from typing import Any

from atlas_jax.core.experts import ExpertFields, capacity
from atlas_jax.planning.run import AnyRun, Pretraining


@dataclasses.dataclass(frozen=True)
class Room:
    """The places of experts for one kind of text.

    Attributes:
      text: the kind.
      tokens: of a text.
      experts: of a Switch layer.
      layers: number of Switch layers that read the text.
      places: of each expert, for a text.
    """

    text: str
    tokens: int
    experts: int
    layers: int
    places: int


def experts_of(run: AnyRun) -> int:
    """Experts of each Switch layer; 0 without any."""
    return _config(run).num_experts


def rooms(run: AnyRun) -> list[Room]:
    """The room for a reader's inputs and, where it trains, its targets; or for an encoder's rows.

    It is that of training if the run trains, else that of evaluation; empty without experts.
    """
    config = _config(run)
    if not config.num_experts:
        return []
    trains = isinstance(run, Pretraining) or run.entry == "train"
    factor = config.train_capacity_factor if trains else config.eval_capacity_factor
    found = []
    for text, (depth, tokens) in _texts(run).items():
        layers = sum(config.is_switch(layer) for layer in range(depth))
        places = capacity(tokens, config.num_experts, factor)
        found.append(Room(text, tokens, config.num_experts, layers, places))
    return found


def _texts(run: AnyRun) -> dict[str, tuple[int, int]]:
    """Kind of text -> layers of the stack that reads it, and its tokens."""
    if isinstance(run, Pretraining):
        return {"rows": (run.encoder.num_layers, run.pretraining.train.length)}
    reader = run.models.reader.config
    inputs = {"reader inputs": (reader.num_encoder_layers, run.step.reader_length)}
    targets = {"targets": (reader.num_decoder_layers, run.data.target_length)}
    return inputs | (targets if run.entry == "train" else {})


def _config(run: AnyRun) -> ExpertFields:
    config: Any = run.encoder.tower if isinstance(run, Pretraining) else run.models.reader.config
    found: ExpertFields = config
    return found
