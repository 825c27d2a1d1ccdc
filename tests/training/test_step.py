"""The training step: both forms, all losses, sharding, accumulation, non-finite steps."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import from_gin
from atlas_jax.core import partitioning
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import STANDARD_RULES, MeshConfig, PartitionRules, Rule
from atlas_jax.core.parts import PARTS
from atlas_jax.corpus.retrieval import make_device_retrieve, rerank, retrieved_already
from atlas_jax.distillation.config import DistillationConfig
from atlas_jax.index.exact import exact_search
from atlas_jax.index.int8 import quantized
from atlas_jax.models.parameters import init_params
from atlas_jax.models.towers import embed_query
from atlas_jax.training import state as train_state
from atlas_jax.training.config import OptimizerConfig, StepConfig
from atlas_jax.training.optimizers import make_optimizer
from atlas_jax.training.step import compile_train_step, make_train_step
from atlas_jax.training.trainer import check_rerank
from tests.training.models import ROWS, random_batch, random_index, tiny_models

LOSSES = ("adist", "emdr2", "pdist", "loop")
# Warm temperatures: at 0.01 a float32 rounding of the scores is a visible change of the loss.
DISTILLATION = {loss: DistillationConfig(loss, 0.5, 0.5) for loss in LOSSES}


SINGLE = MeshConfig(1, 1, 1)


class Run:
    """One compiled step on one mesh, with everything it needs."""

    def __init__(
        self,
        mesh_config: MeshConfig,
        devices: int = 8,
        loss: str = "pdist",
        training: Any = "joint",
        dropout: float = 0.0,
        kind: Any = "adamw",
        reader: dict[str, Any] | None = None,
        rules: Sequence[Rule] = STANDARD_RULES,
        **step: Any,
    ) -> None:
        self.mesh = partitioning.make_mesh(mesh_config, jax.devices()[:devices])
        self.rules = rules
        self.models = tiny_models(dropout, **(reader or {}))
        # The sum of the two losses is not scale free, so plain gradients show through eps=1.
        optimizer = OptimizerConfig(kind=kind, learning_rate=0.1, schedule="constant", epsilon=1.0)
        self.optimizers = {part: make_optimizer(optimizer) for part in PARTS}
        fields = {"k": 4, "reader_length": 14, "retriever_training": training, **step}
        self.config = StepConfig(**fields)
        trains = train_state.what_trains(self.config, self.models)
        args = (self.optimizers, trains, self.mesh, rules)
        self.shardings = train_state.state_shardings(self.models, *args)
        # Drawn on one device, then spread: a program that draws takes as long to compile as a
        # step, and each mesh would need one of its own.
        one = partitioning.make_mesh(SINGLE, jax.devices()[:1])
        with partitioning.activate(one, STANDARD_RULES):
            drawn = jax.device_get(init_params(self.models, 0, one, STANDARD_RULES))
        with self.active():
            params = jax.device_put(drawn, self.shardings.params)
            self.state = train_state.make_state(
                self.models, params, self.optimizers, trains, 0, self.mesh, rules
            )
        self.retrieve = make_device_retrieve(self.config.searched, self.mesh)
        self.step = self.compile(self.retrieve, loss)

    def active(self) -> Any:
        return partitioning.activate(self.mesh, self.rules)

    def compile(self, retrieve: Any, loss: str = "pdist") -> Any:
        step = make_train_step(
            self.models, self.config, DISTILLATION[loss], self.optimizers, retrieve
        )
        return compile_train_step(step, self.shardings, self.mesh, self.rules)

    def __call__(self, steps: int = 2) -> tuple[train_state.TrainState, dict[str, Any]]:
        index, state = random_index(self.mesh), self.state
        with self.active():
            for seed in range(steps):
                state, metrics = self.step(state, index, random_batch(seed))
        return jax.device_get((state, metrics))


def assert_close(a: Any, b: Any, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_4x2_mesh_takes_the_step_of_a_single_device(loss: str) -> None:
    single_state, single = Run(SINGLE, 1, loss)()
    sharded_state, sharded = Run(MeshConfig(data=4, model=2), 8, loss)()
    assert single["retriever_loss"] > 0
    assert single["retriever_grad_norm"] > 0
    assert_close(single, sharded)
    assert_close(single_state.params, sharded_state.params)


def test_an_fsdp_mesh_with_adafactor_takes_the_step_of_a_single_device() -> None:
    single_state, single = Run(SINGLE, 1, kind="adafactor")()
    sharded_state, sharded = Run(MeshConfig(data=2, fsdp=2, model=2), 8, kind="adafactor")()
    assert_close(single, sharded)
    # Moments and not parameters: a key's bias has no gradient but rounding, which Adafactor
    # scales to full steps of either sign; neither loss nor any other parameter feels it.
    assert_close(single_state.opt_state, sharded_state.opt_state)


def test_tokens_split_over_the_model_axis_take_the_step_of_a_single_device() -> None:
    load_gin(["mesh/sequence.gin"], [])
    rules = tuple(from_gin.told(PartitionRules).rules)
    standard = tuple(rule for rule in STANDARD_RULES if rule[0] != "rows")
    assert rules == (*standard, ("length", "model"), ("source", "model"))
    single_state, single = Run(SINGLE, 1)()
    split_state, split = Run(MeshConfig(data=2, fsdp=2, model=2), 8, rules=rules)()
    assert_close(single, split)
    assert_close(single_state.params, split_state.params)


@pytest.mark.parametrize("loss", ["pdist", "adist"])
def test_passages_that_devices_share_take_the_step_of_a_single_device(loss: str) -> None:
    load_gin(["mesh/passages.gin"], [])
    rules = tuple(from_gin.told(PartitionRules).rules)
    assert {"heads", "mlp", "vocab"}.isdisjoint(dict(rules))
    single_state, single = Run(SINGLE, 1, loss)()
    split_state, split = Run(MeshConfig(data=2, fsdp=2, model=2), 8, loss, rules=rules)()
    assert_close(single, split)
    assert_close(single_state.params, split_state.params)


def test_two_slices_take_the_step_of_a_single_device() -> None:
    single_state, single = Run(SINGLE, 1)()
    sliced_state, sliced = Run(MeshConfig(data=2, model=2, dcn=2), 8)()
    assert_close(single, sliced)
    assert_close(single_state.params, sliced_state.params)


def test_the_host_form_takes_the_step_of_the_device_form() -> None:
    device = Run(SINGLE, 1)
    index, batch = random_index(device.mesh), random_batch()
    with device.active():
        query_be = embed_query(device.models.retriever, device.state.params, batch)
        passages = jax.device_get(device.retrieve(index, query_be, batch))
        host_step = device.compile(retrieved_already)
        host_state, host = host_step(jax.tree.map(jnp.copy, device.state), passages, batch)
        device_state, from_device = device.step(device.state, index, batch)
    assert_close(host, from_device)
    assert_close(host_state.params, device_state.params)


@pytest.mark.parametrize("loss", ["pdist", "emdr2"])
def test_accumulation_gives_the_gradients_of_the_whole_batch(loss: str) -> None:
    whole_state, whole = Run(SINGLE, 1, loss)()
    parts_state, parts = Run(SINGLE, 1, loss, accumulate=4)()
    assert_close(whole, parts)
    assert_close(whole_state.params, parts_state.params)


def test_accumulation_has_to_divide_the_batch() -> None:
    with pytest.raises(UserError, match="accumulate = 3"):
        Run(SINGLE, 1, accumulate=3)()


def test_query_side_and_fixed_training_leave_their_towers_alone() -> None:
    for training, moved in (("joint", True), ("query_side", False), ("fixed", False)):
        run = Run(SINGLE, 1, training=training)
        before = jax.device_get(run.state.params["retriever"])
        after = run()[0].params["retriever"]

        def changed(tower: str, before: Any = before, after: Any = after) -> bool:
            same = jax.tree.map(np.array_equal, before[tower], after[tower])
            return not all(jax.tree.leaves(same))

        assert changed("passage_encoder") == moved
        assert changed("query_encoder") == (training != "fixed")


@pytest.mark.parametrize("clip", ["apart", "together"])
@pytest.mark.parametrize("frozen_steps", [0, 1])
def test_gradients_are_bounded_apart_or_as_one_vector(clip: Any, frozen_steps: int) -> None:
    """Adam's first moment after one step is a tenth of the gradient as it was clipped."""
    largest, run = 0.01, Run(SINGLE, 1, clip=clip)
    adam = OptimizerConfig(schedule="constant", clip_norm=largest)
    step = make_train_step(
        run.models,
        run.config,
        DISTILLATION["pdist"],
        {part: make_optimizer(adam) for part in PARTS},
        run.retrieve,
        frozen_steps,
    )
    with run.active():
        compiled = compile_train_step(step, run.shardings, run.mesh, run.rules)
        state, metrics = jax.device_get(compiled(run.state, random_index(run.mesh), random_batch()))
    norms = {part: float(metrics[f"{part}_grad_norm"]) for part in PARTS}
    assert min(norms.values()) > largest
    clipped = {part: 10 * optax.tree.norm(state.opt_state[part][1].mu) for part in norms}
    if clip == "apart":
        expected = {part: largest for part in norms}
    elif frozen_steps:  # the retriever's gradient does not count
        expected = {part: largest * norm / norms["reader"] for part, norm in norms.items()}
    else:
        both = math.sqrt(norms["reader"] ** 2 + norms["retriever"] ** 2)
        expected = {part: largest * norm / both for part, norm in norms.items()}
    for part, norm in clipped.items():
        np.testing.assert_allclose(norm, expected[part], rtol=1e-5)


def test_dropout_is_drawn_from_key_and_step_alone() -> None:
    first_state, first = Run(SINGLE, 1, dropout=0.1)()
    second_state, second = Run(SINGLE, 1, dropout=0.1)()
    jax.tree.map(np.testing.assert_array_equal, first_state, second_state)
    _, without = Run(SINGLE, 1, dropout=0.0)()
    assert first["reader_loss"] == second["reader_loss"] != without["reader_loss"]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    run = Run(SINGLE, 1)
    params = run.state.params
    params["reader"]["encoder"]["encoder_norm"]["scale"] = jnp.full(16, jnp.nan)
    state, metrics = run(steps=2)
    assert metrics["skipped"] == state.skipped == 2
    assert state.step == 2
    kernels = jax.device_get(Run(SINGLE, 1).state.params["retriever"])
    jax.tree.map(np.testing.assert_array_equal, kernels, state.params["retriever"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.opt_state))


def test_the_compiled_step_shards_the_index_and_never_gathers_it() -> None:
    run = Run(MeshConfig(data=4, model=2))
    rows = 8 * 1000  # more than any other axis, so that its size shows up nowhere else
    index = random_index(run.mesh, rows=rows)
    with run.active():
        text = run.step.lower(run.state, index, random_batch()).compile().as_text()
    shapes = re.findall(r"= \(?\w+\[(\d+)(?:,\d+)*\]", text)
    assert str(rows // 8) in shapes
    assert str(rows) not in shapes
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather", text)
    largest = max((int(np.prod([int(d) for d in s.split(",") if d])) for s in gathered), default=0)
    assert largest < rows


def test_three_steps_are_one_compilation_and_their_state_is_donated() -> None:
    run = Run(MeshConfig(data=4, model=2))
    before = jax.tree.leaves(run.state)
    run(steps=3)
    assert run.step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in before)


def test_moments_lie_like_their_parameters() -> None:
    run = Run(MeshConfig(data=2, fsdp=2, model=2))
    adam = run.state.opt_state["reader"][1]
    kernel = lambda tree: tree["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]  # noqa: E731
    assert kernel(adam.mu).sharding == kernel(run.state.params["reader"]).sharding
    assert kernel(adam.nu).addressable_shards[0].data.shape == (8, 16)


def test_query_side_scores_are_those_of_the_index_embeddings() -> None:
    """The passage tower does not move, so embeddings from the index stand in for it."""
    run = Run(SINGLE, 1, training="query_side")
    index, batch = random_index(run.mesh), random_batch()
    with run.active():
        query_be = embed_query(run.models.retriever, run.state.params, batch)
        passages = run.retrieve(index, query_be, batch)
    rows_bk = np.asarray(passages.rows_bk)
    expected = np.einsum("be,bke->bk", query_be, np.asarray(index.embeddings_ne)[rows_bk])
    np.testing.assert_allclose(passages.scores_bk, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(passages.embeddings_bke, np.asarray(index.embeddings_ne)[rows_bk])


def test_reranking_reads_what_a_fresh_index_would_give_first() -> None:
    """With all rows searched, a stale index and re-ranking find what a fresh index finds."""
    run = Run(MeshConfig(data=2), 2, rerank=ROWS - 3)
    stale, batch = random_index(run.mesh), random_batch()
    retriever = run.models.retriever
    params = run.state.params["retriever"]
    with run.active():
        fresh = stale.replace(
            embeddings_ne=retriever.apply(
                {"params": params}, stale.retriever_tokens_nm, method="embed_passage"
            )
        )
        query_be = embed_query(retriever, run.state.params, batch)
        wanted = exact_search(fresh, query_be, 4, batch.excluded_rows_bx, mesh=run.mesh)
        passages = run.retrieve(stale, query_be, batch)
        found = rerank(retriever, params, query_be, passages, 4)
        np.testing.assert_array_equal(found.rows_bk, wanted.rows_bk)
        assert_close(found.scores_bk, wanted.scores_bk)
        assert_close(found.reader_tokens_bkl, stale.reader_tokens_nl[wanted.rows_bk])
        # And the step itself reads just these.
        rerank_state, reranked = run.step(jax.tree.map(jnp.copy, run.state), stale, batch)
        plain = Run(MeshConfig(data=2), 2)
        plain_state, from_fresh = plain.step(plain.state, fresh, batch)
    assert_close(reranked, from_fresh)
    assert_close(rerank_state.params, plain_state.params)


@pytest.mark.parametrize("config", [SINGLE, MeshConfig(2, 2, 2)], ids=["one", "eight"])
def test_reranking_makes_an_int8_index_exact(config: MeshConfig) -> None:
    """Query-side training from 8 bits, with all rows searched, is that from float32 rows."""
    devices = 1 if config is SINGLE else 8
    run = Run(config, devices, training="query_side", rerank=ROWS - 3)
    plain = Run(config, devices, training="query_side")
    index, batch = random_index(run.mesh), random_batch()
    with run.active():
        params = {"params": run.state.params["retriever"]}
        exact_ne = run.models.retriever.apply(
            params, index.retriever_tokens_nm, method="embed_passage"
        )
        rounded = index.replace(embeddings_ne=quantized(exact_ne))
        state, metrics = run.step(run.state, rounded, batch)
        want_state, want = plain.step(plain.state, index.replace(embeddings_ne=exact_ne), batch)
    assert_close(metrics, want)
    assert_close(state.params, want_state.params)


@pytest.mark.parametrize("training", ["query_side", "fixed"])
@pytest.mark.parametrize("config", [SINGLE, MeshConfig(2, 2, 2)], ids=["one", "eight"])
def test_a_passage_tower_that_does_not_run_needs_no_tokens(
    config: MeshConfig, training: Any
) -> None:
    run = Run(config, 1 if config is SINGLE else 8, training=training)
    index, batch = random_index(run.mesh), random_batch()
    assert not run.config.embeds_passages
    with run.active():
        want_state, want = run.step(jax.tree.map(jnp.copy, run.state), index, batch)
        state, metrics = run.step(run.state, index.replace(retriever_tokens_nm=None), batch)
    assert_close(metrics, want, rtol=0, atol=0)
    assert_close(state.params, want_state.params, rtol=0, atol=0)


@pytest.mark.parametrize("rerank", [3, 4])
def test_reranking_fewer_than_are_read_is_refused(rerank: int) -> None:
    words = f"StepConfig.rerank = {rerank}: expected 0, or more than StepConfig.k = 4"
    with pytest.raises(UserError, match=words):
        StepConfig(k=4, rerank=rerank)


@pytest.mark.parametrize(
    ("training", "dtype", "fine"),
    [
        ("joint", "float32", True),
        ("query_side", "int8", True),
        ("query_side", "bfloat16", False),
        ("fixed", "float32", False),
    ],
)
def test_reranking_that_could_change_nothing_is_refused(
    training: Any, dtype: str, fine: bool
) -> None:
    step = StepConfig(k=4, rerank=8, retriever_training=training)
    if fine:
        return check_rerank(step, dtype)
    with pytest.raises(UserError, match=f"StepConfig.rerank = 8 changes nothing: .* in {dtype}"):
        check_rerank(step, dtype)
