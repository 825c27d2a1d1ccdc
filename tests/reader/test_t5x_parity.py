"""The reader against a checkpoint and outputs of the real T5X, where shared/ is at hand."""

import json
import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest

from atlas_jax.reader import fid, inputs
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5, pick_logprobs

SHARED = Path(os.environ.get("ATLAS_SHARED", Path(__file__).parents[3] / "shared"))
FOLDER = SHARED / "data" / "t5x"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "params.npz").exists(),
    reason=f"no T5X sample at {FOLDER}; set ATLAS_SHARED to the folder that has data/t5x",
)


def reader() -> tuple[T5, dict[str, Any]]:
    described = json.loads((FOLDER / "model.json").read_text())
    fields = {k: v for k, v in described["config"].items() if k not in ("network", "step")}
    return T5(ReaderConfig(**fields)), described["params"]


def test_parameter_names_shapes_and_axes() -> None:
    model, described = reader()
    tokens = np.ones((1, 2), np.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    ours = flax.traverse_util.flatten_dict(boxed, sep="/")
    assert set(ours) == set(described)
    for name, entry in described.items():
        assert list(ours[name].value.shape) == entry["shape"], name
        assert list(ours[name].names) == entry["axes"], name


def test_outputs() -> None:
    model, _ = reader()
    with np.load(FOLDER / "params.npz") as file:
        params = flax.traverse_util.unflatten_dict(dict(file), sep="/")
    with np.load(FOLDER / "io.npz") as file:
        expected = dict(file)
    source, targets = expected["encoder_input_tokens"], expected["decoder_target_tokens"]
    np.testing.assert_array_equal(
        inputs.shift_right(targets)[targets > 0], expected["decoder_input_tokens"][targets > 0]
    )

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        encoded = model.apply({"params": params}, source, method="encode")
        read = expected["decoder_input_tokens"]
        return encoded, model.apply({"params": params}, encoded, source > 0, read, method="decode")

    encoded, logits = run(params)
    real = source > 0
    np.testing.assert_allclose(
        np.asarray(encoded)[real], expected["encoder_output"][real], rtol=0, atol=1e-5
    )
    real = targets > 0
    np.testing.assert_allclose(
        np.asarray(logits)[real], expected["logits"][real], rtol=0, atol=1e-5
    )
    loss, count = fid.summed_loss(pick_logprobs(logits, targets), targets)
    np.testing.assert_allclose(loss, expected["cross_entropy_sum"], rtol=1e-6)
    assert count == expected["loss_weights_sum"]
