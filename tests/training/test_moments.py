"""Converted optimiser states go on where they stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from atlas_jax import from_gin
from atlas_jax.conversion.convert import convert, expected_shapes, settle_config
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.interop.meta_atlas import read_checkpoint
from atlas_jax.interop.t5x import write_checkpoint
from atlas_jax.interop.tensors import Part, Tensors, of_array
from atlas_jax.reader.scanned import stack_layers
from atlas_jax.training.config import OptimizerConfig
from atlas_jax.training.moments import fill
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.trainer import train
from tests.interop import small
from tests.training.runs import write_run

ADAM = OptimizerConfig(kind="adamw", learning_rate=0.1, schedule="constant", clip_norm=0.0)


def all_of(opt_state: Any, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def moments(opt_state: Any, kind: type) -> Any:
    return all_of(opt_state, kind)[0]


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


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_moments_of_layers_go_to_a_reader_that_scans_them(kind: Any) -> None:
    """Moments of unrolled layers, then the same of stacked ones, to the bit."""
    optimizer = make_optimizer(dataclasses.replace(ADAM, kind=kind))
    rng = np.random.default_rng(0)
    shapes = {"wide": (130, 140), "high": (140, 130), "even": (130, 130), "scale": (5,)}

    def layer() -> Any:
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    whole = {
        "encoder": {f"layers_{i}": layer() for i in range(3)},
        "decoder": {"layers_0": layer()},
    }
    _, state = optimizer.update(whole, optimizer.init(whole), whole)
    scanned = stack_layers(whole)
    found = fill(optimizer.init(scanned), saved_of(state), "file")
    _, expected = optimizer.update(scanned, optimizer.init(scanned), scanned)
    kinds = (optax.ScaleByAdamState, optax.FactoredState)
    for one in kinds:
        for ours, theirs in zip(all_of(found, one), all_of(expected, one), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    short = {n: t for n, t in saved_of(state).items() if "encoder/layers_2/" not in n}
    with pytest.raises(UserError, match=r"encoder/layers/.* has shape \[2, .*optimiser's is \[3, "):
        fill(optimizer.init(scanned), short, "file")


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


def test_a_momentum_is_not_dropped_in_silence() -> None:
    factored = make_optimizer(dataclasses.replace(ADAM, kind="adafactor"))
    state = factored.init(some_params())
    saved = saved_of(state)
    name = "param_states/encoder/b/scale/m"
    saved[name] = of_array(np.zeros(1, np.float32), name)
    fill(state, saved, "file")
    saved[name] = of_array(np.zeros(5, np.float32), name)
    with pytest.raises(UserError, match=f"file: {name} is a momentum"):
        fill(state, saved, "file")


SIZES = {"vocab_size": 368, "emb_dim": 16, "num_heads": 2, "num_encoder_layers": 1,
         "num_decoder_layers": 1, "head_dim": 8, "mlp_dim": 32}  # fmt: skip
STEP, LARGE = 1003, 1e6


def write_t5x(folder: Path) -> None:
    """A T5X checkpoint of the size of `runs.GIN` with Adafactor's state: large moments."""
    part = Part("reader", dict(SIZES), {})
    settle_config(part)
    rng = np.random.default_rng(0)
    part.optimizer["step"] = of_array(np.asarray(STEP, np.int32), "step")
    for name, shape in expected_shapes(part).items():
        array = rng.standard_normal(shape).astype(np.float32) * 0.1
        part.tensors[name] = of_array(array, name, (name,))
        fields = {field: np.zeros(1, np.float32) for field in ("m", "v_row", "v_col")}
        fields["v"] = np.full(shape, LARGE, np.float32)
        for field, values in fields.items():
            part.optimizer[f"param_states/{name}/{field}"] = of_array(values, field)
    folder.mkdir()
    write_checkpoint(part, folder, scan=False, step=0)


@pytest.mark.slow
def test_a_run_goes_on_from_a_t5x_checkpoint(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    """Convert, train two steps: with the moments, large as they are, hardly anything moves."""
    gin_file = write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)
    write_t5x(tmp_path / "t5x")
    tokenizers = {"reader": str(small.reader_tokenizer(tmp_path))}
    job = small.job("t5x", "atlas-jax", tmp_path / "t5x", tmp_path / "o", tokenizers=tokenizers)
    convert(job, small.quiet)
    before = small.params(small.parts_of(tmp_path / "o")["reader"])

    def run(taken: bool, **more: str) -> tuple[float, Any]:
        """The largest step of a parameter, and Adafactor's state."""
        bindings = {
            "ModelConfig.reader": f"'{tmp_path / 'o'}'", "ModelConfig.reader_tokenizer": "''",
            "ModelConfig.optimizer_state": taken, "StepConfig.retriever_training": "'fixed'",
            "TrainConfig.model_dir": f"'{tmp_path / str(taken)}'", "TrainConfig.total_steps": 2,
            "TrainConfig.passages": "'none'", "EvalConfig.file": "''",
            "reader/OptimizerConfig.kind": "'adafactor'",
            "reader/OptimizerConfig.weight_decay": 0.0, **more,
        }  # fmt: skip
        load_gin([str(gin_file)], [f"{name}={value}" for name, value in bindings.items()])
        state = train(from_gin.train_run())
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params["reader"], before)
        return max(jax.tree.leaves(moved)), moments(state.opt_state["reader"], optax.FactoredState)

    none = {
        "ModelConfig.reader": "''",
        "ModelConfig.reader_tokenizer": f"'{reader_tokenizer_file}'",
    }
    with pytest.raises(
        UserError, match=r"optimizer_state: there is none in ModelConfig\.reader = "
    ):
        run(True, **none)
    fresh, _ = run(False)
    small_step, adafactor = run(True)
    assert fresh > 1e-3 and small_step < fresh / 100
    assert int(adafactor.count) == STEP + 2
    # What two steps leave of a moment: 1 - (step + 1) ** -0.8 of it each time.
    left = np.prod([1 - (STEP + i + 1.0) ** -0.8 for i in range(2)])
    for moment in jax.tree.leaves(adafactor.v):
        np.testing.assert_allclose(moment, LARGE * left, rtol=1e-5)
