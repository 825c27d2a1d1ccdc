"""Partial model folders over models that are loaded already; what both have is shared."""

import dataclasses
import fnmatch
from typing import Any

from flax import traverse_util
from flax.core import meta

from atlas_jax.core import multihost, partitioning
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.core.types import Params
from atlas_jax.models.assembly import Assembled
from atlas_jax.models.folder import OwnPart, load_own
from atlas_jax.models.matching import check_params
from atlas_jax.models.parameters import abstract_params
from atlas_jax.models.partial import Base, over
from atlas_jax.reader.scanned import stack_layers, unstack_layers
from atlas_jax.retriever.dual_encoder import UNTIED, DualEncoder, is_tied


def variant(made: Assembled, bases: dict[str, Base], folder: str) -> Assembled:
    """The loaded models with what a partial folder has beyond them.

    What was found for the passages stays: it has to embed them as the loaded models do, and leave
    what never trains as it is.

    Arrays that both have lie in memory once. Two folders of one form give equal `Models`, so one
    compiled program serves both.

    Args:
      made: the models that the folder stands on.
      bases: what they are, by part.
      folder: a partial model folder.

    Raises:
      UserError: a folder at fault, or one that stands on other models (both fingerprints are told).
    """
    found = {name: part for name, part in load_own(folder).items() if name in PARTS}
    if not found:
        raise UserError(f"model folder {folder} has neither a reader nor a retriever")
    for name, own in found.items():
        if own.base is None:
            raise UserError(
                f"model folder {folder}: its {name} is whole and stands on no base; load it "
                "by itself"
            )
        if (own.base.fingerprint, own.base.part) != (bases[name].fingerprint, name):
            raise UserError(
                f"model folder {folder}: its {name} stands on a {own.base.part} with the "
                f"fingerprint {own.base.fingerprint[:12]}; the one that is loaded has "
                f"{bases[name].fingerprint[:12]}"
            )
        _check_passages(folder, name, own, made)
    models, params = made.models, dict(made.params)
    if "retriever" in found and not found["retriever"].config.get("tied", True):
        params["retriever"] = _two_towers(params["retriever"])
        config = dataclasses.replace(models.retriever.config, tied=False)
        models = dataclasses.replace(models, retriever=DualEncoder(config))
    deltas = [(p, DeltaConfig(**f)) for own in found.values() for p, f in own.deltas.items()]
    models = dataclasses.replace(models, deltas=tuple(deltas))
    boxed = abstract_params(models)
    shapes, specs = meta.unbox(boxed), partitioning.param_shardings(boxed, made.mesh, made.rules)
    for name, own in found.items():
        if name == "reader" and models.reader.config.scan_layers:
            whole = stack_layers(over(unstack_layers(params[name]), own.params))
            params[name] = multihost.place(multihost.to_host(whole), specs[name])
        else:
            params[name] = over(params[name], _placed(own.params, specs[name]))
        check_params(params[name], shapes[name], f"{folder} ({name})")
    return dataclasses.replace(made, models=models, params=params)


def _check_passages(folder: str, name: str, own: OwnPart, made: Assembled) -> None:
    paths = list(traverse_util.flatten_dict(own.params, sep="/"))
    if name == "retriever":
        changed = [path for path in paths if not path.startswith("query_encoder/")]
    else:
        kept = made.models.reader.config.untrained
        changed = [path for path in paths if any(fnmatch.fnmatchcase(path, one) for one in kept)]
    if changed:
        raise UserError(
            f"model folder {folder}: {name}/{changed[0]} changes what is computed of passages in "
            "advance; load the folder by itself"
        )


def _two_towers(params: Params) -> Params:
    """An untied retriever of a tied one, on the same arrays."""
    return dict.fromkeys(sorted(UNTIED), params["encoder"]) if is_tied(params) else params


def _placed(own: Params, specs: Params) -> Params:
    flat, places = (traverse_util.flatten_dict(tree, sep="/") for tree in (own, specs))
    unknown = [path for path in flat if path not in places]
    if unknown:
        raise UserError(f"{unknown[0]} is no parameter of the model that is loaded")
    placed: dict[str, Any] = {p: multihost.place(leaf, places[p]) for p, leaf in flat.items()}
    tree: Params = traverse_util.unflatten_dict(placed, sep="/")
    return tree
