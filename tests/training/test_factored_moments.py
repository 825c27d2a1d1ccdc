"""Adafactor's factored moments on a mesh: how they lie, and that the step is the same.

optax factors a matrix whose second largest axis is 128 or more, so these models are wide.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from atlas_jax.core.partitioning import MeshConfig
from tests.training.test_moments import moments
from tests.training.test_step import SINGLE, Run, assert_close

EMBED, MLP, HEADS, LAYERS = 128, 256, 2, 2
WIDE = {
    "vocab_size": 192,
    "emb_dim": EMBED,
    "num_heads": HEADS,
    "head_dim": EMBED // HEADS,
    "mlp_dim": MLP,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
}
# Axes left to the moment, those that are split: `embed` over fsdp, `mlp`, `joined_kv` and `vocab`
# over model. The row lacks the largest axis, the later one of equals; the column the other.
EXPECTED = {
    "mlp/wi_0/kernel": ((EMBED, "fsdp"), (MLP, "model")),
    "mlp/wo/kernel": ((EMBED, "fsdp"), (MLP, "model")),
    "attention/query/kernel": ((EMBED, "fsdp"), (EMBED, "model")),
    "attention/out/kernel": ((EMBED, "model"), (EMBED, "fsdp")),
}


def make_run(mesh: MeshConfig, devices: int, scan: bool) -> Run:
    reader = {**WIDE, "scan_layers": scan}
    return Run(mesh, devices, kind="adafactor", training="fixed", reader=reader)


def by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("scan", [False, True], ids=["unscanned", "scanned"])
def test_factored_moments_lie_like_what_they_keep_and_take_the_same_step(scan: bool) -> None:
    sharded, single = make_run(MeshConfig(2, 2, 2), 8, scan), make_run(SINGLE, 1, scan)
    adafactor = moments(sharded.state.opt_state["reader"], optax.FactoredState)
    rows, columns = by_name(adafactor.v_row), by_name(adafactor.v_col)
    stack = "encoder/layers" if scan else "encoder/layers_1"
    for name, lying in EXPECTED.items():
        for moment, (size, axis) in zip((rows, columns), lying, strict=True):
            found = moment[f"{stack}/{name}"]
            leading = (LAYERS,) if scan else ()
            assert found.shape == (*leading, size), name
            assert [*found.sharding.spec] == [*(None for _ in leading), axis], name
            assert found.addressable_shards[0].data.shape == (*leading, size // 2)
    embedding = rows["token_embedder/embedding"], columns["token_embedder/embedding"]
    assert [(one.shape, *one.sharding.spec) for one in embedding] == [
        ((EMBED,), "fsdp"),
        ((192,), "model"),
    ]

    factored = [name for name, row in rows.items() if math.prod(row.shape) > 1]
    assert len(factored) == (1 + 7 + 11 if scan else 1 + LAYERS * (7 + 11)) + 1
    before = by_name(jax.device_get(single.state.params["reader"]))
    # One step: of a gradient that is but rounding Adafactor makes a full step of either sign in
    # what it does not factor, which the next loss feels.
    sharded_state, metrics = sharded(steps=1)
    single_state, expected = single(steps=1)
    assert_close(metrics, expected)
    assert_close(sharded_state.opt_state, single_state.opt_state)
    got, want = (by_name(one.params["reader"]) for one in (sharded_state, single_state))
    for name in factored:
        assert np.abs(want[name] - before[name]).max() > 0.05, name  # the rate is 0.1
        np.testing.assert_allclose(got[name], want[name], rtol=2e-3, atol=2e-3, err_msg=name)
