"""Which models of a run are written as the trained part alone, on top of a base."""

from collections.abc import Mapping

from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Params
from atlas_jax.models.assembly import Trained
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.parameters import Models


def written_in_part(
    config: ModelConfig,
    models: Models,
    moving: Mapping[str, Params],
    frozen: Mapping[str, Params],
    chosen: bool,
) -> dict[str, Trained]:
    """The models of which only the trained part is written, each with the folder that it stands on.

    Args:
      config: names the folders.
      moving, frozen: the parameters that trained and the others, by part.
      chosen: whether patterns of the run said what trains.
    """
    partial = {}
    for part in PARTS:
        folder, base = (getattr(config, name) for name in (part, f"{part}_base"))
        own = moving.get(part, {})
        # A model that stood still is named beside one that is written in part.
        small = any(path.partition("/")[0] == part or not own for path, _ in models.deltas)
        if folder and frozen.get(part) and (chosen or small):
            partial[part] = Trained(own, folder, base)
    return partial
