"""TPU chips and slices: the user's and the compiler's names for them, and their peak figures.

Peak bfloat16 rate, HBM size and HBM bandwidth are from the pages "TPU v4", "TPU v5e", "TPU v5p" and
"TPU v6e" of the Cloud TPU documentation (cloud.google.com/tpu/docs). The interconnect's figures are
from "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter "TPUs"). They count both
directions of one axis of the torus, since a ring collective uses both. The data-centre network's
are from the pages "TPU v5e" and "TPU v6e", as a pod's rate divided by its 256 chips, and from that
book for v4 and v5p (200 Gbit/s for a host of four chips). The HBM that a program may use is the
limit that libtpu's compiler names when it refuses a program.
"""

import dataclasses
import re
from typing import Any

from atlas_jax.core.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU chip.

    Attributes:
      name: as in slice names.
      hbm_bytes: HBM that a compiled program may use.
      bf16_flops: peak, per second.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: bytes per second of one torus axis, both directions.
      dcn_bandwidth: bytes per second that a chip may send to other slices.
      cores_per_chip: how much each chip adds to the number in a slice name.
      shapes: number of chips in a slice -> the compiler's name of its shape.
      device_kinds: JAX's `Device.device_kind` for this chip.
    """

    name: str
    hbm_bytes: int
    bf16_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    cores_per_chip: int
    shapes: dict[int, str]
    device_kinds: tuple[str, ...]


_PLANES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1.228e12, 9e10, 6.25e9, 2, _CUBES, ("TPU v4",)),
        Chip("v5e", int(15.75 * GIB), 197e12, 8.19e11, 9e10, 3.125e9, 1, _PLANES, ("TPU v5 lite",)),
        Chip(
            "v5p", int(95.73 * GIB), 459e12, 2.765e12, 1.8e11, 6.25e9, 2, _CUBES,
            ("TPU v5", "TPU v5p"),
        ),
        Chip(
            "v6e", int(31.24 * GIB), 918e12, 1.64e12, 1.8e11, 1.25e10, 1, _PLANES,
            ("TPU v6 lite",),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice as Cloud TPU names it: v4 and v5p count TensorCores, v5e and v6e chips."""

    name: str
    chip: Chip
    chips: int

    @property
    def topology(self) -> str:
        """The compiler's name of this slice's shape, such as `v5e:16x16`."""
        return f"{self.chip.name}:{self.chip.shapes[self.chips]}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of the torus, as (16, 16)."""
        return tuple(int(size) for size in self.chip.shapes[self.chips].split("x"))

    @property
    def closed(self) -> tuple[bool, ...]:
        """Whether each axis of the torus is a ring.

        v4 and v5p are built of cubes of 4 x 4 x 4, whose faces are joined. A v5e or v6e axis is
        closed only if it has all 16 chips of the pod.
        """
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    @property
    def topology_options(self) -> dict[str, Any]:
        """Further arguments of `get_topology_desc`: each chip is one device, even if it has two
        cores (v4) or is alone on its host (one v5e or v6e chip)."""
        if self.chip.name == "v4":
            return {"chip_config_name": "megacore"}
        return {"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {}


def parse_slice(name: str) -> Slice:
    """`v4-128` (64 chips), `v5litepod-256` or `v5e-256` (256), `v5p-64` (32), `v6e-32` (32).

    Raises:
      UserError: an unknown generation, or a size that does not exist; lists those that do.
    """
    found = re.fullmatch(r"(v5litepod|v\d+[a-z]*)-(\d+)", name)
    generation = found[1].replace("v5litepod", "v5e") if found else ""
    if found is None or generation not in CHIPS:
        raise UserError(
            f"topology {name!r}: expected one of {', '.join(CHIPS)} with a size, as v5e-256 or v4-8"
        )
    chip, number = CHIPS[generation], int(found[2])
    sizes = [chips * chip.cores_per_chip for chips in chip.shapes]
    if number not in sizes:
        counts = "TensorCores" if chip.cores_per_chip == 2 else "chips"
        raise UserError(
            f"topology {name!r}: {generation} slices have {', '.join(map(str, sizes))} {counts}"
        )
    return Slice(f"{generation}-{number}", chip, number // chip.cores_per_chip)


def peak_flops(device_kind: str) -> float:
    """Dense bfloat16 FLOP/s of one chip by JAX's name for it; 0.0 if the name is unknown."""
    return next((c.bf16_flops for c in CHIPS.values() if device_kind in c.device_kinds), 0.0)
