"""Optimiser state of T5X's scanned layout, against what T5X's Adafactor keeps of either layout."""

from pathlib import Path

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.interop.t5x import read_checkpoint, write_checkpoint
from atlas_jax.interop.t5x_files import find_checkpoint
from atlas_jax.interop.t5x_moments import scanned_state, unscanned_state
from atlas_jax.interop.tensors import Part, Tensors, of_array
from tests.interop import small
from tests.interop.scanned_layers import CASES, LAYERS, shapes
from tests.interop.test_t5x import contents

GOLDENS = Path(__file__).parents[1] / "goldens" / "t5x_scanned.npz"  # and its script


def golden(case: str, layout: str) -> Tensors:
    prefix = f"{case}/{layout}/"
    with np.load(GOLDENS) as file:
        names = [name for name in file.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): of_array(file[name], name) for name in names}


def target_of(case: str) -> Tensors:
    return {name: of_array(np.zeros(shape, np.float32), name)
            for name, shape in shapes(case).items()}  # fmt: skip


def config_of(case: str) -> dict[str, int]:
    return {"num_encoder_layers": LAYERS, "num_heads": CASES[case][1], "head_dim": CASES[case][2]}


@pytest.mark.parametrize("case", CASES)
def test_as_t5x_keeps_it_of_unrolled_layers(case: str) -> None:
    """Same gradients, same moments; means are taken in another order: 1e-6 of each."""
    found = unscanned_state(golden(case, "scanned"), target_of(case), "file")
    expected = golden(case, "unscanned")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        value = expected[name].read()
        assert tensor.shape == value.shape, name
        np.testing.assert_allclose(tensor.read(), value, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_to_the_bit(case: str) -> None:
    state, target, config = golden(case, "scanned"), target_of(case), config_of(case)
    unrolled = unscanned_state(state, target, "file")
    assert small.all_bits(scanned_state(unrolled, target, config)) == small.all_bits(state)


def test_what_does_not_fit_is_named() -> None:
    target = target_of("wide")
    kernel, scale = "encoder/encoder/mlp/wo/kernel", "encoder/encoder/pre_mlp_layer_norm/scale"
    for name, shape, told in (
        (f"{kernel}/v_row", (2, 192), r"shape \[2, 192\]; its parameter asks for \[2, 128\]"),
        (f"{kernel}/v_col", (2, 192), r"shape \[2, 192\]; its parameter asks for \[192, 2\]"),
        (f"{scale}/v", (128,), r"shape \[128\]; its parameter asks for \[128, 2\]"),
        ("encoder/encoder/other/v", (2,), "belongs to no parameter"),
    ):
        state = {f"param_states/{name}": of_array(np.zeros(shape, np.float32), name)}
        with pytest.raises(UserError, match=f"file: param_states/{name} .*{told}"):
            unscanned_state(state, target, "file")


def test_a_moment_that_some_layers_lack_is_not_scanned() -> None:
    state = golden("wide", "unscanned")
    name = "param_states/encoder/layers_1/mlp/wo/kernel/v_row"
    del state[name]
    with pytest.raises(UserError, match=f"{name} is missing, and other layers have it"):
        scanned_state(state, target_of("wide"), config_of("wide"))


# --- whole checkpoints -----------------------------------------------------------------


def with_state(part: Part, kind: str) -> Part:
    """A part with the state of an optimiser: numbers that differ everywhere."""
    rng = np.random.default_rng(0)
    state = {"step": np.asarray(7, np.int32)}
    if kind == "adamw":
        state["param_states/0/count"] = np.asarray(7, np.int32)
    for name, tensor in part.tensors.items():
        values = [rng.standard_normal(tensor.shape).astype(np.float32) for _ in range(2)]
        filler = np.zeros(1, np.float32)
        if kind == "adamw":
            state |= {f"param_states/0/mu/{name}": values[0],
                      f"param_states/0/nu/{name}": values[1]}  # fmt: skip
        elif kind == "adafactor":
            state |= {f"param_states/{name}/{field}": filler for field in ("v_row", "v_col")}
            state |= {f"param_states/{name}/v": values[0], f"param_states/{name}/m": values[1]}
    part.optimizer = {name: of_array(array, name) for name, array in state.items()}
    if kind == "adamw":
        part.empty = {"param_states/1": "map"}
    return part


@pytest.mark.parametrize("kind", ["adafactor", "adamw"])
def test_a_checkpoint_with_its_state(kind: str, tmp_path: Path) -> None:
    """Unrolled -> scanned -> ours -> scanned and unrolled: not a byte of any file differs."""
    convert, quiet = small.convert, small.quiet
    source, plain = tmp_path / "source", tmp_path / "plain"
    convert(small.job("hf", "t5x", small.GOLDENS / "t5_v1_1", source), quiet)
    part = with_state(read_checkpoint(source), kind)
    plain.mkdir()
    write_checkpoint(part, plain, scan=False, step=0)
    tokenizers = {"reader": str(small.reader_tokenizer(tmp_path))}
    stacked, ours = tmp_path / "stacked", tmp_path / "ours"
    convert(small.job("t5x", "t5x", plain, stacked, scan_layers=True), quiet)
    convert(small.job("t5x", "atlas-jax", stacked, ours, tokenizers=tokenizers), quiet)
    for scan, expected in ((True, stacked), (False, plain)):
        back = tmp_path / f"back{scan}"
        done = convert(small.job("atlas-jax", "t5x", ours, back, scan_layers=scan), quiet)
        assert len(done[0].tensors) > 2 * len(part.tensors)
        assert contents(find_checkpoint(back)) == contents(find_checkpoint(expected))
    again = read_checkpoint(stacked)
    assert small.all_bits(again.optimizer) == small.all_bits(part.optimizer)
    assert again.empty == part.empty
