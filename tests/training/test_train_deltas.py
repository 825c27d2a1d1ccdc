"""Training adapters and LoRA of both models, with everything else frozen."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.deltas import DeltaConfig, split_delta
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, make_mesh
from atlas_jax.core.parts import PARTS
from atlas_jax.models.parameters import abstract_params
from atlas_jax.training.config import StepConfig
from atlas_jax.training.state import Trains, split_trainable, what_trains
from tests.training import test_step as steps
from tests.training.models import tiny_models
from tests.training.test_pair_step import PAIR

DELTAS = {
    "lora": DeltaConfig("lora", 2),
    "prefix": DeltaConfig("prefix", length=3, network="mlp", width=5),
    "prompt": DeltaConfig("prompt", length=3, network="lama"),
}
OF_RETRIEVER = {
    "lora": DeltaConfig("adapter", 4),
    "prefix": DeltaConfig("prefix", length=2),
    "prompt": DeltaConfig("prefix", length=2, network="mlp", width=4),
}


def run(mesh: MeshConfig, devices: int, monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    deltas = (("reader", DELTAS[kind]), ("retriever", OF_RETRIEVER[kind]))

    def models(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(tiny_models(*args, **kwargs), deltas=deltas)

    monkeypatch.setattr(steps, "tiny_models", models)
    return steps.Run(mesh, devices)


@pytest.mark.parametrize("kind", list(DELTAS))
def test_the_base_stays_bit_for_bit_on_one_device_and_on_eight(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    states = []
    for mesh, devices in ((MeshConfig(1, 1, 1), 1), (MeshConfig(data=2, fsdp=2, model=2), 8)):
        one = run(mesh, devices, monkeypatch, kind)
        before = jax.device_get(one.state)
        for part, config in (("reader", DELTAS[kind]), ("retriever", OF_RETRIEVER[kind])):
            leaves = [x for x in jax.tree.leaves(before.opt_state[part]) if np.ndim(x)]
            own, small = split_delta(before.params[part])
            scales = len(jax.tree.leaves(small)) // 3 if config.kind == "lora" else 0
            assert len(leaves) == 2 * (len(jax.tree.leaves(small)) - scales)
        after, metrics = one(3)
        assert metrics["reader_grad_norm"] > 0
        assert metrics["retriever_grad_norm"] > 0
        for part in ("reader", "retriever"):
            own, small = split_delta(before.params[part])
            new_own, new_small = split_delta(after.params[part])
            jax.tree.map(np.testing.assert_array_equal, new_own, own)
            changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), new_small, small)
            assert sum(jax.tree.leaves(changed)) >= len(jax.tree.leaves(changed)) // 2
        states.append(after)
    steps.assert_close(states[0].params, states[1].params)


def test_patterns_say_what_trains() -> None:
    params = {
        "reader": {"mlp": {"kernel": np.ones(2), "lora": {"down": {"kernel": np.ones(3)}}},
                   "norm": {"scale": np.ones(4)}},
        "retriever": {"query_encoder": {"a": np.ones(5)}, "passage_encoder": {"a": np.ones(6)}},
    }  # fmt: skip

    def sizes(training: Any, *patterns: str) -> list[int]:
        trained, frozen = split_trainable(params, Trains(training, patterns))
        assert sorted(x.size for x in jax.tree.leaves((trained, frozen))) == [2, 3, 4, 5, 6]
        return sorted(x.size for x in jax.tree.leaves(trained))

    assert sizes("joint") == [3, 5, 6]
    assert sizes("query_side") == [3, 5]
    assert sizes("fixed") == [3]
    assert sizes("joint", "reader/norm/*", "*/query_encoder/*") == [4, 5]
    assert sizes("fixed", "reader/*") == [2, 3, 4]
    with pytest.raises(UserError, match=r"StepConfig.train: 'retriever/\*' is the path of no"):
        sizes("fixed", "retriever/*")
    with pytest.raises(UserError, match="most like it are reader/norm/scale"):
        sizes("joint", "reader/norms/*")
    with pytest.raises(UserError, match=r"StepConfig.train = 'reader/\*': expected a list"):
        StepConfig(train="reader/*")


PATTERNS = ("reader/decoder/*/wo/kernel", "*/query_encoder/*layer_norm*")


def test_patterns_alone_have_gradients_and_moments() -> None:
    """Of both models, with decay on; everything else stays bit for bit."""
    one = steps.Run(MeshConfig(data=2, fsdp=2, model=2), 8, train=PATTERNS)
    before = jax.device_get(one.state)
    moving, frozen = split_trainable(before.params, what_trains(one.config, one.models))
    for part in PARTS:
        leaves = [leaf for leaf in jax.tree.leaves(before.opt_state[part]) if np.ndim(leaf)]
        assert [leaf.shape for leaf in leaves] == 2 * [
            leaf.shape for leaf in jax.tree.leaves(moving[part])
        ]
    assert len(jax.tree.leaves(moving["reader"])) == 1
    after, metrics = one(3)
    assert metrics["reader_grad_norm"] > 0 and metrics["retriever_grad_norm"] > 0
    moved, still = split_trainable(after.params, what_trains(one.config, one.models))
    jax.tree.map(np.testing.assert_array_equal, still, frozen)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), moved, moving)
    assert all(jax.tree.leaves(changed))


def test_a_pair_encoder_leaves_what_never_trains_out_of_the_optimiser() -> None:
    models = tiny_models(**PAIR)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        params = meta.unbox(abstract_params(models))
    moving, frozen = split_trainable(params, what_trains(StepConfig(), models))
    assert set(frozen["reader"]) == {"token_embedder", "encoder"}
    assert set(frozen["reader"]["encoder"]) == {"embeddings", "layers_0"}
    assert {"layers_1", "matches", "rarity"} == set(moving["reader"]["encoder"])
