"""Make `t5x_scanned.npz`: what T5X's own Adafactor keeps of the same layers in both layouts.

    git clone https://github.com/google-research/t5x
    python -m tests.goldens.make_t5x_scanned_goldens --t5x t5x

The golden file was made with t5x cc342d4 (April 2026) and jax 0.10.2. Of T5X only
`t5x/adafactor.py` is run; what it imports of T5X stands in below.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from tests.interop.scanned_layers import CASES, STEPS, gradients, split

GOLDENS = Path(__file__).parent / "t5x_scanned.npz"
AXES = {
    "attention/query/kernel": ("embed", "layers", "heads", "kv"),
    "attention/out/kernel": ("heads", "layers", "kv", "embed"),
    "mlp/wi_0/kernel": ("embed", "layers", "mlp"),
    "mlp/wo/kernel": ("mlp", "layers", "embed"),
    "pre_mlp_layer_norm/scale": ("embed", "layers"),
}


class State(NamedTuple):
    step: Any
    param_states: Any


class OptimizerDef:
    def __init__(self, hyper_params: Any) -> None:
        self.hyper_params = hyper_params


def adafactor_of(checkout: Path) -> Any:
    """T5X's module of Adafactor, without the rest of T5X."""
    package, utils, optimizers = (
        types.ModuleType(n) for n in ("t5x", "t5x.utils", "t5x.optimizers")
    )
    utils.flatten_dict_string_keys = lambda x: traverse_util.flatten_dict(x, sep="/")  # type: ignore[attr-defined]
    optimizers.OptimizerDef, optimizers.OptimizerState = OptimizerDef, State  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"t5x": package, "t5x.utils": utils, "t5x.optimizers": optimizers})
    spec = importlib.util.spec_from_file_location("adafactor", checkout / "t5x" / "adafactor.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def states(module: Any, grads: list[dict[str, np.ndarray]], axes: Any) -> dict[str, np.ndarray]:
    """Everything Adafactor keeps after these gradients, by T5X's names."""
    optimizer = module.Adafactor(1e-3, logical_factor_rules=module.standard_logical_factor_rules())
    if axes is not None:
        optimizer.set_param_axes(axes)
    params = {name: np.ones_like(array) for name, array in grads[0].items()}
    found = {name: optimizer.init_param_state(array, name) for name, array in params.items()}
    for step, each in enumerate(grads):
        for name, gradient in each.items():
            params[name], found[name] = optimizer.apply_param_gradient(
                step, optimizer.hyper_params, params[name], found[name], gradient, name
            )
    return {
        f"param_states/{name}/{field}": np.asarray(getattr(state, field))
        for name, state in found.items()
        for field in ("m", "v", "v_row", "v_col")
    }


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--t5x", type=Path, required=True, help="folder of a checkout")
    module = adafactor_of(parser.parse_args().t5x)
    arrays = {}
    for case in CASES:
        scanned = [gradients(case, step) for step in range(STEPS)]
        axes = {f"encoder/encoder/{name}": AXES[name] for name in AXES}
        # tree_map would go into tuples of names: T5X has them as leaves of their own.
        leaves = {name: PartitionNames(value) for name, value in axes.items()}
        for layout, found in (
            ("scanned", states(module, scanned, leaves)),
            ("unscanned", states(module, [split(each) for each in scanned], None)),
        ):
            arrays.update({f"{case}/{layout}/{name}": array for name, array in found.items()})
    np.savez_compressed(GOLDENS, **arrays)


class PartitionNames:
    """Axis names as one leaf of a tree."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __iter__(self) -> Any:
        return iter(self.names)


if __name__ == "__main__":
    main()
