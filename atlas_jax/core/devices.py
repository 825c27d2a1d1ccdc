"""The devices of a run: what it is told of them, and they themselves made current."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.partitioning import MeshConfig, PartitionRules, Rule


@dataclasses.dataclass(frozen=True)
class Devices:
    """How arrays lie on the devices, and how programs are compiled for them.

    Attributes:
      mesh: the shape of the mesh.
      rules: which mesh axis each logical axis is split over.
      compiler: what XLA is told.
    """

    mesh: MeshConfig = MeshConfig()
    rules: PartitionRules = PartitionRules()
    compiler: CompilerConfig = CompilerConfig()


@contextlib.contextmanager
def use_devices(devices: Devices) -> Iterator[tuple[Mesh, tuple[Rule, ...]]]:
    """Build mesh and rules and make them current in this thread.

    Raises:
      UserError: the mesh does not fit the devices that are there.
    """
    devices.compiler.apply()
    mesh, rules = partitioning.make_mesh(devices.mesh), tuple(devices.rules.rules)
    with partitioning.activate(mesh, rules):
        yield mesh, rules
