"""Begin a run with the optimiser state in a converted model folder.

The state is in `<part>_optimizer.safetensors`, beside the parameters, under T5X's names:
`param_states/<parameter>/{v_row,v_col,v}` of Adafactor, or `param_states/0/{mu,nu}/<parameter>` of
AdamW. The moments and their count continue; schedules begin anew. The file has unrolled layers.
For a reader that scans its layers they are stacked on a leading axis.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.parts import PARTS
from atlas_jax.interop.safetensors_files import read_file
from atlas_jax.interop.tensors import Tensor, Tensors, stacked
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.folder import open_model
from atlas_jax.training.state import TrainState

_STACKED = "/layers/"  # in the name of a scanned reader's parameters
_FILLER = (1,)
_TOWERS = ("query_encoder/", "passage_encoder/")  # of an untied retriever; tied: encoder/


def taken_over(state: TrainState, config: ModelConfig) -> TrainState:
    """The state, with the moments from the model folders of ModelConfig that have some.

    A model whose folder has none begins with fresh moments: a T5X checkpoint has only a reader.

    Raises:
      UserError: no folder of a trained model has an optimiser state, or the state is of another
        optimiser, or a moment does not fit (it is named).
    """
    opt_state = dict(state.opt_state)
    found = {part: _saved(part, config) for part in PARTS if _is_trained(opt_state[part])}
    if not any(found.values()):
        folders = " and ".join(f"ModelConfig.{p} = {getattr(config, p)!r}" for p in found)
        raise UserError(
            f"ModelConfig.optimizer_state: there is none in {folders}; convert from a format "
            "that has it, without --no_optimizer"
        )
    for part, file in found.items():
        if file is not None:
            opt_state[part] = fill(opt_state[part], read_file(file), str(file))
    return state.replace(opt_state=opt_state)  # type: ignore[attr-defined]


def _is_trained(opt_state: Any) -> bool:
    """Whether a model has moments; without trainable parameters it has only counts."""
    return any(np.ndim(leaf) for leaf in jax.tree.leaves(opt_state))


def _saved(part: str, config: ModelConfig) -> Path | None:
    folder = getattr(config, part)
    return open_model(folder)[part].optimizer if folder else None


def fill(opt_state: Any, saved: Tensors, where: str) -> Any:
    """Replace the moments of an optax state by saved ones.

    Args:
      opt_state: of `optimizers.make_optimizer`.
      saved: tensors under T5X's names.

    Raises:
      UserError: see `taken_over`, or the saved Adafactor had momentum, which this one lacks.
    """
    filled = []

    def one(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            filled.append("adamw")
            return node._replace(
                count=_put(saved, "param_states/0/count", node.count, where),
                mu=_tree(node.mu, saved, "param_states/0/mu/{}", where),
                nu=_tree(node.nu, saved, "param_states/0/nu/{}", where),
            )
        if isinstance(node, optax.FactoredState):
            filled.append("adafactor")
            _refuse_momentum(saved, where)
            return node._replace(
                count=_put(saved, "step", node.count, where),
                v_row=_tree(node.v_row, saved, "param_states/{}/v_row", where),
                v_col=_tree(node.v_col, saved, "param_states/{}/v_col", where),
                v=_tree(node.v, saved, "param_states/{}/v", where),
            )
        return node

    kinds = (optax.ScaleByAdamState, optax.FactoredState)
    result = jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, kinds))
    assert len(filled) == 1, "make_optimizer has one element with moments"
    return result


def _refuse_momentum(saved: Tensors, where: str) -> None:
    """Refuse a saved momentum; without momentum, T5X saves a single number in its place."""
    for name, tensor in saved.items():
        if name.endswith("/m") and tensor.shape != (1,):
            raise UserError(
                f"{where}: {name} is a momentum; OptimizerConfig.kind = 'adafactor' has none, "
                "so the run would not go on as it was: leave ModelConfig.optimizer_state off"
            )


def _tree(tree: Any, saved: Tensors, template: str, where: str) -> Any:
    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        key = template.format(name)
        for tower in _TOWERS:
            if key not in saved and name.startswith(tower):
                key = template.format(f"encoder/{name.removeprefix(tower)}")
        return _put(saved, key, leaf, where)

    return jax.tree_util.tree_map_with_path(one, tree)


def _put(saved: Tensors, key: str, leaf: Any, where: str) -> Any:
    """Place the saved array on the devices of the present one."""
    found = _layers(saved, key, leaf.shape) if _STACKED in key else saved.get(key)
    if found is None:
        raise UserError(
            f"{where}: has no {key}; it belongs to another optimiser than OptimizerConfig.kind says"
        )
    if found.shape != leaf.shape:
        raise UserError(
            f"{where}: {key} has shape {list(found.shape)}; the optimiser's is {list(leaf.shape)}"
        )
    return multihost.place(found.read().astype(np.dtype(leaf.dtype)), leaf.sharding)


def _layers(saved: Tensors, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """Stack the moments of all layers on a leading axis; None if there are none.

    A moment that Adafactor does not keep is a single number for all layers.
    """
    layers: list[Tensor] = []
    while (one := key.replace(_STACKED, f"/layers_{len(layers)}/")) in saved:
        layers.append(saved[one])
    if not layers:
        return None
    return layers[0] if shape == _FILLER else stacked(layers, 0)
