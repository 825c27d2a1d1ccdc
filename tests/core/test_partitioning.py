"""Meshes, logical rules and the strict constraint."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.layers import Dense
from atlas_jax.core.partitioning import (
    STANDARD_RULES,
    MeshConfig,
    PartitionRules,
    Rule,
    activate,
    constrain,
    make_mesh,
)


def test_mesh_takes_the_remaining_devices() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=-1, fsdp=2, model=2))
    assert dict(mesh.shape) == {"dcn": 1, "data": 2, "fsdp": 2, "expert": 1, "model": 2}


def test_devices_that_simulate_slices_are_taken_in_order() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=-1, model=2, dcn=2))
    assert dict(mesh.shape) == {"dcn": 2, "data": 2, "fsdp": 1, "expert": 1, "model": 2}
    ids = [[device.id for device in one.flat] for one in mesh.devices]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert partitioning.index_axes(mesh) == ("data", "fsdp", "expert", "model")
    assert partitioning.index_parts(mesh) == 4
    assert partitioning.over_slices(mesh, 6) == PartitionSpec("dcn")
    assert partitioning.over_slices(mesh, 3) == PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a TPU device decides its place in a mesh."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        """Four chips of a slice stand in a square."""
        return (self.id // 2 % 2, self.id // 4, 0)


def test_tpu_slices_are_told_apart() -> None:
    chips = [Chip(id, slice_index=id % 2) for id in range(8)]  # in no order
    mesh = partitioning.make_mesh(MeshConfig(fsdp=2, dcn=2), chips)  # type: ignore[arg-type]
    assert dict(mesh.shape) == {"dcn": 2, "data": 2, "fsdp": 2, "expert": 1, "model": 1}
    assert [{chip.slice_index for chip in one.flat} for one in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="on 2 slices: bind MeshConfig.dcn = 2"):
        partitioning.make_mesh(MeshConfig(), chips)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1)])
def test_mesh_refuses_sizes_that_do_not_fit(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="MeshConfig"):
        partitioning.make_mesh(MeshConfig(*sizes))


def test_rules_use_each_mesh_axis_once() -> None:
    spec = partitioning.logical_to_spec
    rows = ("dcn", "data", "fsdp", "expert")
    assert spec(("batch", "length", "embed")) == PartitionSpec(rows, None, None)
    assert spec(("expert", "embed", "expert_mlp")) == PartitionSpec("expert", "fsdp", "model")
    assert spec(("expert", "expert_group", "length", "embed")) == PartitionSpec(
        "expert", ("dcn", "data", "fsdp"), None, None
    )
    assert spec(("embed", "joined_kv")) == PartitionSpec("fsdp", "model")
    assert spec(("vocab", "embed")) == PartitionSpec("model", "fsdp")
    assert spec(("index", None)) == PartitionSpec(("data", "fsdp", "expert", "model"), None)


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


@pytest.mark.parametrize(
    ("rows", "rules", "axes"),
    [
        (16, STANDARD_RULES, ("dcn", "data", "fsdp", "model")),
        (4, STANDARD_RULES, ("dcn", "data", "fsdp")),  # does not divide over 8
        (16, tuple(rule for rule in STANDARD_RULES if rule[0] != "rows"), ("dcn", "data", "fsdp")),
    ],
)
def test_passages_lie_over_all_devices_if_they_divide(
    rows: int, rules: tuple[Rule, ...], axes: tuple[str, ...]
) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    x = np.zeros((rows, 6), np.float32)

    def passages(x: jax.Array) -> jax.Array:
        with partitioning.passage_rows():
            return constrain(x, "batch", "mlp")

    def placed(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec)

    with activate(mesh, rules):
        spread = jax.jit(passages)(x).sharding
        queries = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x).sharding
    split = None if "model" in axes else "model"
    assert spread.is_equivalent_to(placed(PartitionSpec(axes, split)), 2)
    assert queries.is_equivalent_to(placed(PartitionSpec(("data", "fsdp"), "model")), 2)
