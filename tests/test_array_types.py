"""The axes and types that annotations give are checked in the tests, and in the tests alone."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import atlas_jax
from atlas_jax.core import layers
from atlas_jax.distillation import kl, pdist
from atlas_jax.encoders import visible
from atlas_jax.index import exact, staleness
from atlas_jax.reader import attention, generate, t5
from atlas_jax.retriever import contrastive, dual_encoder
from tests.conftest import CHECKED

LOGP_BKT = np.zeros((2, 3, 4), np.float32)
TARGETS_BT = np.ones((2, 4), np.int32)
ZEROS_24 = np.zeros((2, 4))


@pytest.mark.parametrize(
    ("logp_bkt", "targets_bt", "named"),
    [
        (LOGP_BKT, TARGETS_BT[:, :3], "targets_bt"),  # another t
        (LOGP_BKT[:1], TARGETS_BT, "targets_bt"),  # another b
        (LOGP_BKT[:, 0], TARGETS_BT, "logp_bkt"),  # an axis too few
        (LOGP_BKT.astype(int), TARGETS_BT, "logp_bkt"),
        (LOGP_BKT, TARGETS_BT.astype(float), "targets_bt"),
    ],
)
def test_a_wrong_axis_or_type_is_refused_by_name(logp_bkt, targets_bt, named) -> None:
    with pytest.raises(TypeCheckError, match=f"parameter '{named}'"):
        pdist.gold_scores(logp_bkt, targets_bt)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (visible.attention_bias, (np.ones((2, 3, 4, 5), bool),), "mask"),  # a head has no mask
        (dual_encoder.pool, (np.zeros((2, 3, 4)), TARGETS_BT, "cls"), "tokens_bl"),
        (contrastive.moco_loss, (ZEROS_24, np.zeros((3, 4)), None, 1.0, True), "key_be"),
        (exact.top_k_rows, (np.zeros(8), 2, 8), "scores_bn"),
        (staleness.measure, (ZEROS_24, np.ones(3), ZEROS_24, ZEROS_24, 1), "weight_b"),
        (attention.mask_bias, (TARGETS_BT,), "mask"),
        (t5.pick_logprobs, (LOGP_BKT, TARGETS_BT), "targets"),
        (generate.restrict, (LOGP_BKT, 1, 1.0), "logits_bv"),
    ],
)
def test_every_package_refuses_a_wrong_axis(function, arguments, named) -> None:
    with pytest.raises(TypeCheckError, match=f"parameter '{named}'"):
        function(*arguments)


def test_every_module_that_gives_axes_is_checked() -> None:
    package = Path(atlas_jax.__file__).parent
    names = {
        ".".join(("atlas_jax", *path.relative_to(package).with_suffix("").parts))
        for path in package.rglob("*.py")
        if "from jaxtyping import" in path.read_text("utf-8")
    }
    checked = tuple(f"{one}." for one in CHECKED)
    assert [one for one in sorted(names) if not f"{one}.".startswith(checked)] == []


def test_right_axes_pass_as_numpy_as_jax_and_traced() -> None:
    plain = pdist.gold_scores(LOGP_BKT, TARGETS_BT)
    traced = jax.jit(pdist.gold_scores)(jnp.asarray(LOGP_BKT), jnp.asarray(TARGETS_BT))
    assert plain.shape == traced.shape == (2, 3)


def test_a_wrong_axis_is_refused_while_tracing_too() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'kernel'"):
        jax.eval_shape(layers.matmul, jnp.zeros((2, 3)), jnp.zeros((4, 5)))
    with pytest.raises(TypeCheckError, match="parameter 'mask_bk'"):
        jax.eval_shape(kl.masked_log_softmax, jnp.zeros((2, 3)), jnp.zeros((2, 4), bool))


def test_an_axis_may_depend_on_an_argument() -> None:
    scores_bk, rows_bk = exact.top_k_rows(np.zeros((2, 8), np.float32), 3, 8)
    assert scores_bk.shape == rows_bk.shape == (2, 3)


def test_without_the_tests_no_call_is_checked() -> None:
    program = "\n".join(
        [
            "import importlib, inspect, sys",
            *(f"importlib.import_module({name!r})" for name in CHECKED),
            "from atlas_jax.distillation import pdist",
            "assert inspect.unwrap(pdist.gold_scores) is pdist.gold_scores",
            "assert 'beartype' not in sys.modules",
        ]
    )
    subprocess.run([sys.executable, "-c", program], check=True)
