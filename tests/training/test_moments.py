"""Converted optimiser states go on where they stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from atlas_jax.core.errors import UserError
from atlas_jax.interop.meta_atlas import read_checkpoint
from atlas_jax.interop.tensors import Tensors, of_array
from atlas_jax.training.moments import fill
from atlas_jax.training.optimizers import OptimizerConfig, make_optimizer
from tests.interop import small

ADAM = OptimizerConfig(kind="adamw", learning_rate=0.1, schedule="constant", clip_norm=0.0)


def moments(opt_state: Any, kind: type) -> Any:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(leaf for leaf in leaves if isinstance(leaf, kind))


def saved_of(opt_state: Any) -> Tensors:
    """A state of ours under T5X's names."""
    saved: dict[str, Any] = {}

    def tree(values: Any, template: str) -> None:
        for name, value in traverse_util.flatten_dict(values, sep="/").items():
            saved[template.format(name)] = value

    for node in jax.tree.leaves(
        opt_state, is_leaf=lambda x: isinstance(x, (optax.ScaleByAdamState, optax.FactoredState))
    ):
        if isinstance(node, optax.ScaleByAdamState):
            saved["param_states/0/count"] = node.count
            tree(node.mu, "param_states/0/mu/{}")
            tree(node.nu, "param_states/0/nu/{}")
        elif isinstance(node, optax.FactoredState):
            saved["step"] = node.count
            for field in ("v_row", "v_col", "v"):
                tree(getattr(node, field), f"param_states/{{}}/{field}")
    return {name: of_array(np.asarray(value), name, (name,)) for name, value in saved.items()}


def some_params() -> Any:
    rng = np.random.default_rng(0)
    return {
        "encoder": {
            "a": {"kernel": rng.standard_normal((130, 140)).astype(np.float32)},
            "b": {"scale": rng.standard_normal(5).astype(np.float32)},
        }
    }


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_the_next_update_is_the_one_that_would_have_come(kind: Any) -> None:
    optimizer = make_optimizer(dataclasses.replace(ADAM, kind=kind))
    params = some_params()
    gradients = [jax.tree.map(lambda x, i=i: np.sin(x + i), params) for i in range(3)]
    state = optimizer.init(params)
    for gradient in gradients[:2]:
        _, state = optimizer.update(gradient, state, params)
    taken = fill(optimizer.init(params), saved_of(state), "file")
    expected, _ = optimizer.update(gradients[2], state, params)
    found, _ = optimizer.update(gradients[2], taken, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    fresh, _ = optimizer.update(gradients[2], optimizer.init(params), params)
    assert np.abs(fresh["encoder"]["b"]["scale"] - expected["encoder"]["b"]["scale"]).max() > 1e-3


def test_the_moments_of_an_atlas_checkpoint(tmp_path: Path) -> None:
    part = read_checkpoint(small.GOLDENS / "atlas_tied.pth.tar").parts["reader"]
    params = jax.tree.map(jax.numpy.asarray, small.params(part))
    state = fill(make_optimizer(ADAM).init(params), part.optimizer, "file")
    adam = moments(state, optax.ScaleByAdamState)
    assert int(adam.count) == 2
    name = "decoder/layers_1/mlp/wo/kernel"
    found = traverse_util.flatten_dict(adam.nu, sep="/")[name]
    np.testing.assert_array_equal(found, part.optimizer[f"param_states/0/nu/{name}"].read())


def test_the_towers_of_an_untied_retriever_begin_alike() -> None:
    params = some_params()
    optimizer = make_optimizer(ADAM)
    _, state = optimizer.update(params, optimizer.init(params), params)
    untied = {"query_encoder": params["encoder"]}
    taken = fill(optimizer.init(untied), saved_of(state), "file")
    found = moments(taken, optax.ScaleByAdamState).mu["query_encoder"]
    expected = moments(state, optax.ScaleByAdamState).mu["encoder"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_does_not_fit_is_named() -> None:
    params = some_params()
    optimizer = make_optimizer(ADAM)
    saved = saved_of(optimizer.init(params))
    factored = make_optimizer(dataclasses.replace(ADAM, kind="adafactor"))
    with pytest.raises(UserError, match=r"file: has no step; it belongs to another optimiser"):
        fill(factored.init(params), saved, "file")
    name = "param_states/0/mu/encoder/b/scale"
    saved[name] = of_array(np.zeros(6, np.float32), name)
    with pytest.raises(UserError, match=rf"file: {name} has shape \[6\]; the optimiser's is \[5\]"):
        fill(optimizer.init(params), saved, "file")
