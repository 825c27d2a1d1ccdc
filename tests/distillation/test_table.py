"""The losses by name: what each asks of the reader, and a fifth in one line."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.distillation import kl, pdist
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.distillation.signals import Signals
from atlas_jax.distillation.table import LOSSES

RNG = np.random.default_rng(0)
LOGP = jnp.asarray(-RNG.random((2, 3, 4)), jnp.float32)
MASS = jnp.asarray(RNG.random((2, 3)), jnp.float32)


def signals(asked: list[Any]) -> Signals:
    """Made-up signals that note what is asked for."""

    def passage_logprobs(temperature: float) -> Any:
        asked.append(("alone", temperature))
        return LOGP / temperature

    def left_out() -> Any:
        asked.append(("left out", None))
        return LOGP

    def mass() -> Any:
        asked.append(("mass", None))
        return MASS

    return Signals(
        passage_logprobs=passage_logprobs,
        leave_one_out_logprobs=left_out,
        cross_attention_mass=mass,
        num_decoder_layers=2,
        targets_bt=jnp.asarray([[5, 6, 1, 0], [7, 1, 0, 0]]),
        scores_bk=jnp.asarray(RNG.random((2, 3)), jnp.float32),
        mask_bk=jnp.ones((2, 3), bool),
        weight_b=jnp.ones(2),
    )


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("adist", ("mass", None)),
        ("emdr2", ("alone", 0.5)),
        ("pdist", ("alone", 1.0)),
        ("loop", ("left out", None)),
    ],
)
def test_a_loss_asks_the_reader_for_what_it_needs_alone(name: str, asks: Any) -> None:
    asked: list[Any] = []
    total, count = LOSSES[name](signals(asked), DistillationConfig(name, gold_temperature=0.5))
    assert asked == [asks]
    assert np.isfinite(total) and count > 0


def test_pdist_is_the_divergence_from_its_gold_scores() -> None:
    given, config = signals([]), DistillationConfig("pdist")
    gold_bk = pdist.gold_scores(LOGP, given.targets_bt)
    expected = kl.distill_loss(gold_bk, given.scores_bk, given.mask_bk, given.weight_b, config)
    np.testing.assert_array_equal(LOSSES["pdist"](given, config), expected)


def test_a_fifth_loss_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "mine", lambda given, config: (given.scores_bk.sum(), jnp.ones(())))
    assert DistillationConfig("mine").loss == "mine"


def test_a_name_without_a_function_is_refused() -> None:
    with pytest.raises(UserError, match="loss = 'mine': must be one of adist, emdr2, pdist, loop"):
        DistillationConfig("mine")
