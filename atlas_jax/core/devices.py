"""The device settings of a run, and the function that makes its mesh current."""

import contextlib
import dataclasses
from collections.abc import Iterator

from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.core.compiler import CompilerConfig
from atlas_jax.core.partitioning import MeshConfig, PartitionRules, Rule


@dataclasses.dataclass(frozen=True)
class Devices:
    """How arrays are spread over the devices, and how programs are compiled for them.

    Attributes:
      mesh: the shape of the mesh.
      rules: the mesh axis over which each logical axis is split.
      compiler: settings for XLA.
    """

    mesh: MeshConfig = MeshConfig()
    rules: PartitionRules = PartitionRules()
    compiler: CompilerConfig = CompilerConfig()


@contextlib.contextmanager
def use_devices(devices: Devices) -> Iterator[tuple[Mesh, tuple[Rule, ...]]]:
    """Build mesh and rules and make them current in this thread.

    Raises:
      UserError: the mesh does not fit the number of devices.
    """
    devices.compiler.apply()
    mesh, rules = partitioning.make_mesh(devices.mesh), tuple(devices.rules.rules)
    with partitioning.activate(mesh, rules):
        yield mesh, rules
