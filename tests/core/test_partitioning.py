"""Meshes, logical rules and the strict constraint."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense
from atlas_jax.core.partitioning import MeshConfig, PartitionRules


def test_mesh_takes_the_remaining_devices() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=-1, fsdp=2, model=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1)])
def test_mesh_refuses_sizes_that_do_not_fit(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="MeshConfig"):
        partitioning.make_mesh(MeshConfig(*sizes))


def test_rules_use_each_mesh_axis_once() -> None:
    spec = partitioning.logical_to_spec
    assert spec(("batch", "length", "embed")) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec(("embed", "joined_kv")) == PartitionSpec("fsdp", "model")
    assert spec(("vocab", "embed")) == PartitionSpec("model", "fsdp")
    assert spec(("index", None)) == PartitionSpec(("data", "fsdp", "model"), None)


def test_unknown_axis_names_raise_with_or_without_a_mesh() -> None:
    with pytest.raises(UserError, match="'bach'"):
        partitioning.constrain(jnp.zeros(3), "bach")
    with pytest.raises(ValueError, match="2 axis names"):
        partitioning.constrain(jnp.zeros(3), "batch", "length")
    with pytest.raises(UserError, match="'heds'"):
        PartitionRules((("heds", "model"),))
    with pytest.raises(UserError, match="'modle'"):
        PartitionRules((("heads", "modle"),))


def test_constrain_shards_inside_jit() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=4, model=2))
    with partitioning.activate(mesh):
        y = jax.jit(lambda x: partitioning.constrain(x * 2, "batch", "mlp"))(jnp.ones((8, 6)))
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3)}
    assert partitioning.active_mesh() is None


def test_param_shardings_follow_the_axes_and_name_a_misfit() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=4, model=2))

    def boxed(features: int) -> object:
        layer = Dense(features, ("embed", "mlp"))
        return jax.eval_shape(
            lambda: nn.init(lambda m, x: m(x), layer)(jax.random.key(0), jnp.ones((1, 4)))
        )

    shardings = partitioning.param_shardings(boxed(6), mesh)
    assert shardings["params"]["kernel"].spec == PartitionSpec("fsdp", "model")
    with pytest.raises(UserError, match="params/kernel: axis 'mlp' of size 5"):
        partitioning.param_shardings(boxed(5), mesh)
