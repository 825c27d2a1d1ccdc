"""The four losses and their gradients against the independent NumPy version."""

import dataclasses
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.core.errors import UserError
from atlas_jax.distillation import adist, emdr2, kl, loop, pdist
from atlas_jax.distillation.config import DistillationConfig
from tests.distillation import reference_numpy as reference

B, K, T, V, LAYERS, HEADS, LENGTH = 5, 4, 6, 11, 3, 2, 7
MODES = ("adist", "pdist", "loop")


@dataclasses.dataclass
class Case:
    """A ragged batch: targets of 1 to 6 tokens, 4 to 0 real passages, one padding row."""

    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.targets_bt = rng.integers(1, V, (B, T)).astype(np.int32)
        for i, n in enumerate((6, 1, 3, 5, 2)):
            self.targets_bt[i, n:] = 0
        self.mask_bk = np.ones((B, K), bool)
        self.mask_bk[1, 2:] = False  # short of passages
        self.mask_bk[2, 1] = False  # a hole
        self.mask_bk[3, :] = False  # none at all
        self.weight_b = np.array([1, 1, 1, 1, 0], np.float32)
        self.scores_bk = rng.normal(size=(B, K))
        self.logits_bktv = rng.normal(size=(B, K, T, V)) * 2
        self.attention_xbhts = rng.dirichlet(np.ones(K * LENGTH), (LAYERS, B, HEADS, T))
        self.norms_xbhs = rng.uniform(0.5, 20, (LAYERS, B, HEADS, K * LENGTH))
        self.source_mask_bkl = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (B, K))[..., None]

    def logp_bkt(self, temperature: float = 1.0) -> jax.Array:
        logp_bktv = jax.nn.log_softmax(self.logits_bktv / temperature)
        index_bkt1 = np.broadcast_to(self.targets_bt[:, None], (B, K, T))[..., None]
        return jnp.take_along_axis(logp_bktv, index_bkt1, axis=-1)[..., 0]

    def mass_bk(self) -> jax.Array:
        per_source_bs = np.einsum(
            "xbhts,xbhs,bt->bs",
            self.attention_xbhts,
            self.norms_xbhs,
            self.targets_bt != 0,
        )
        per_source_bkl = per_source_bs.reshape(B, K, LENGTH) * self.source_mask_bkl
        return jnp.asarray(per_source_bkl.sum(-1) / HEADS)

    def gold_bk(self, mode: str) -> tuple[jax.Array, np.ndarray]:
        """Ours and the reference's."""
        if mode == "pdist":
            ours = pdist.gold_scores(self.logp_bkt(), self.targets_bt)
            return ours, reference.pdist_scores(self.logits_bktv, self.targets_bt)
        if mode == "loop":
            ours = loop.gold_scores(self.logp_bkt(), self.targets_bt)
            return ours, reference.loop_scores(self.logits_bktv, self.targets_bt)
        ours = adist.gold_scores(self.mass_bk(), self.targets_bt, LAYERS)
        return ours, reference.adist_scores(
            self.attention_xbhts, self.norms_xbhs, self.source_mask_bkl, self.targets_bt
        )


def mean(loss: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., jax.Array]:
    def ratio(*args: object) -> jax.Array:
        total, count = loss(*args)
        return total / count

    return ratio


@pytest.fixture(params=[0, 1])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("mode", MODES)
def test_gold_scores(case: Case, mode: str) -> None:
    ours, expected = case.gold_bk(mode)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_adist_normalizer_without_the_constant(case: Case) -> None:
    ours = adist.gold_scores(case.mass_bk(), case.targets_bt, LAYERS, "target")
    expected = reference.adist_scores(
        case.attention_xbhts, case.norms_xbhs, case.source_mask_bkl, case.targets_bt, constant=1.0
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    with pytest.raises(UserError, match="released, target"):
        adist.gold_scores(case.mass_bk(), case.targets_bt, LAYERS, "mean")


# adist's scores are some 256 times smaller, hence its lower temperature
@pytest.mark.parametrize(("mode", "gold"), [("adist", 0.01), ("pdist", 0.3), ("loop", 0.3)])
@pytest.mark.parametrize("score", [0.1, 1.0])
@pytest.mark.parametrize("reduction", ["batch", "released"])
def test_kl_loss_and_gradient(
    case: Case, mode: str, gold: float, score: float, reduction: str
) -> None:
    config = DistillationConfig(mode, gold, score, reduction)
    gold_bk, expected_gold_bk = case.gold_bk(mode)

    def expected(scores_bk: np.ndarray) -> float:
        return reference.kl_loss(
            expected_gold_bk, scores_bk, case.mask_bk, case.weight_b, gold, score, reduction
        )

    ours = mean(kl.distill_loss)
    args = (gold_bk, jnp.asarray(case.scores_bk), case.mask_bk, case.weight_b, config)
    np.testing.assert_allclose(ours(*args), expected(case.scores_bk), rtol=2e-5)
    np.testing.assert_allclose(
        jax.grad(ours, argnums=1)(*args),
        reference.gradient(expected, case.scores_bk),
        rtol=1e-4,
        atol=1e-6,
    )
    assert not np.any(jax.grad(ours, argnums=0)(*args)), "gradient into the reader's scores"


@pytest.mark.parametrize("gold", [0.5, 1.0])
@pytest.mark.parametrize("score", [0.1, 1.0])
def test_emdr2_loss_and_gradient(case: Case, gold: float, score: float) -> None:
    config = DistillationConfig("emdr2", gold, score)

    def expected(scores_bk: np.ndarray) -> float:
        return reference.emdr2_loss(
            case.logits_bktv, scores_bk, case.targets_bt, case.mask_bk, case.weight_b, gold, score
        )

    ours = mean(emdr2.loss)
    args = (
        case.logp_bkt(gold),
        jnp.asarray(case.scores_bk),
        case.targets_bt,
        case.mask_bk,
        case.weight_b,
        config,
    )
    np.testing.assert_allclose(ours(*args), expected(case.scores_bk), rtol=2e-5)
    np.testing.assert_allclose(
        jax.grad(ours, argnums=1)(*args),
        reference.gradient(expected, case.scores_bk),
        rtol=1e-4,
        atol=1e-6,
    )
    assert not np.any(jax.grad(ours, argnums=0)(*args)), "gradient into the reader"


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("reduction", ["batch", "released"])
def test_masked_passages_never_count(case: Case, rubbish: float, reduction: str) -> None:
    config = DistillationConfig("pdist", 0.3, 0.1, reduction)
    gold_bk, _ = case.gold_bk("pdist")
    scores_bk = jnp.asarray(case.scores_bk)

    def kl_of(gold_bk: jax.Array, scores_bk: jax.Array) -> jax.Array:
        return mean(kl.distill_loss)(gold_bk, scores_bk, case.mask_bk, case.weight_b, config)

    def emdr2_of(logp_bkt: jax.Array, scores_bk: jax.Array) -> jax.Array:
        return mean(emdr2.loss)(
            logp_bkt, scores_bk, case.targets_bt, case.mask_bk, case.weight_b, config
        )

    for loss, reader in ((kl_of, gold_bk), (emdr2_of, case.logp_bkt())):
        masked = case.mask_bk.reshape(B, K, *[1] * (reader.ndim - 2))
        spoilt = (
            jnp.where(masked, reader, rubbish),
            jnp.where(case.mask_bk, scores_bk, rubbish),
        )
        value_and_grad = jax.value_and_grad(loss, argnums=1)
        value, grad = value_and_grad(reader, scores_bk)
        spoilt_value, spoilt_grad = value_and_grad(*spoilt)
        assert value == spoilt_value
        np.testing.assert_array_equal(grad, spoilt_grad)
        assert not np.any(np.asarray(grad)[~case.mask_bk])
        assert not np.any(np.asarray(grad)[case.weight_b == 0])


@pytest.mark.parametrize("reduction", ["batch", "released"])
def test_added_empty_slots_change_nothing(case: Case, reduction: str) -> None:
    config = DistillationConfig("pdist", 0.3, 0.1, reduction)
    gold_bk, _ = case.gold_bk("pdist")

    def wider(x_bk: jax.Array) -> jax.Array:
        return jnp.pad(x_bk, ((0, 0), (0, 3)))

    narrow = (gold_bk, jnp.asarray(case.scores_bk), jnp.asarray(case.mask_bk))
    loss = mean(kl.distill_loss)
    np.testing.assert_allclose(
        loss(*map(wider, narrow), case.weight_b, config),
        loss(*narrow, case.weight_b, config),
        rtol=1e-6,
    )


def test_sums_and_counts_of_microbatches_add_up(case: Case) -> None:
    config = DistillationConfig("emdr2", 1.0, 0.1)
    gold_bk, _ = case.gold_bk("loop")
    kl_args = (gold_bk, case.scores_bk, case.mask_bk, case.weight_b)
    emdr2_args = (case.logp_bkt(), case.scores_bk, case.targets_bt, case.mask_bk, case.weight_b)
    for loss, args in ((kl.distill_loss, kl_args), (emdr2.loss, emdr2_args)):
        args = [jnp.asarray(x) for x in args]
        whole = loss(*args, config)
        first = loss(*[x[:2] for x in args], config)
        second = loss(*[x[2:] for x in args], config)
        np.testing.assert_allclose(np.add(first, second), whole, rtol=1e-6)


def test_nothing_to_learn_gives_zero_sum_and_count() -> None:
    case = Case(0)
    nothing = np.zeros_like(case.mask_bk)
    config = DistillationConfig("pdist")
    gold_bk, _ = case.gold_bk("pdist")
    for loss in (
        lambda s: kl.distill_loss(gold_bk, s, nothing, case.weight_b, config),
        lambda s: emdr2.loss(case.logp_bkt(), s, case.targets_bt, nothing, case.weight_b, config),
    ):
        assert [float(x) for x in loss(jnp.asarray(case.scores_bk))] == [0.0, 0.0]
        grad = jax.grad(lambda s, f=loss: f(s)[0])(jnp.asarray(case.scores_bk))
        assert not np.any(grad), "the gradient has to be zero, and a number"


def test_extreme_temperatures_stay_finite() -> None:
    case = Case(1)
    config = DistillationConfig("pdist", 1e-4, 1e-4)
    gold_bk, _ = case.gold_bk("pdist")
    value, grad = jax.value_and_grad(
        lambda s: kl.distill_loss(gold_bk, s, case.mask_bk, case.weight_b, config)[0]
    )(jnp.asarray(case.scores_bk))
    assert np.isfinite(value) and np.all(np.isfinite(grad)) and np.any(grad)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("loss = 'ppmean'", "DistillationConfig.loss = 'ppmean': must be one of adist, emdr2"),
        ("kl_reduction = 'mean'", "DistillationConfig.kl_reduction = 'mean'"),
        ("adist_normalizer = 'n'", "DistillationConfig.adist_normalizer = 'n'"),
        (
            "gold_temperature = 0",
            "DistillationConfig.gold_temperature = 0: expected a finite",
        ),
        ("score_temperature = -1.0", "DistillationConfig.score_temperature = -1.0"),
    ],
)
def test_bad_bindings_are_named(binding: str, message: str) -> None:
    gin.parse_config(f"DistillationConfig.{binding}")
    with pytest.raises(UserError, match=message):
        from_gin.told(DistillationConfig)
