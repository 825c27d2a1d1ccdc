"""The least time of a program on a slice: bounds with and without overlap, by the slice's links.

A ring needs an axis of the torus that is closed. On an open axis the chip at its end has one link
instead of two, and all that it sends and receives passes through this one. So a collective is
counted at the links that the chip with the fewest has within its group. Where a slice is closed:
"How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter "TPUs").
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atlas_jax.training.chips import Chip, Slice

BETWEEN_SLICES = "dcn"  # the mesh axis whose traffic leaves the slice


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one chip sends in all collectives over the same mesh axes.

    Attributes:
      axes: mesh axes joined by commas, as `fsdp` or `fsdp,model`.
      links: that the chip with the fewest has within its group; 0 between slices.
      bytes: sent by one chip in a run of the program.
    """

    axes: str
    links: int
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """Time on these links; between slices, at a chip's share of its host's network."""
        one_way = chip.ici_bandwidth / 2
        return self.bytes / (self.links * one_way if self.links else chip.dcn_bandwidth)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds on the time of a program whose resources work at their peak.

    Attributes:
      seconds: resource -> time. `compute`: matrix units; `memory`: HBM; `network`: the links
        between chips (ICI); `slices`, only with several: the data-centre network.
    """

    seconds: dict[str, float]
    model_flops: float
    peak_flops: float

    @property
    def step_seconds(self) -> float:
        """Least time if all resources work at the same time: that of the slowest."""
        return max(self.seconds.values())

    @property
    def apart_seconds(self) -> float:
        """Least time if no product runs while a collective does."""
        sending = sum(self.seconds.get(name, 0.0) for name in ("network", "slices"))
        return max(self.seconds["compute"], self.seconds["memory"]) + sending

    @property
    def middle_seconds(self) -> float:
        """Between the two bounds; by this, meshes are compared."""
        return (self.step_seconds + self.apart_seconds) / 2

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def mfu(self) -> float:
        """Model-FLOPs utilisation at `step_seconds`."""
        return self.model_flops / (self.peak_flops * self.step_seconds)

    @property
    def apart_mfu(self) -> float:
        """Model-FLOPs utilisation at `apart_seconds`."""
        return self.model_flops / (self.peak_flops * self.apart_seconds)


def roofline(
    flops: float, model_flops: float, hbm_bytes: float, network: Sequence[Sent], chip: Chip
) -> Roofline:
    """The bounds of this work of one chip.

    Args:
      flops: of all products.
      model_flops: without those that rematerialisation repeats.
      hbm_bytes: read and written.
      network: what the chip sends.
      chip: its peak figures.
    """
    seconds = {
        "compute": flops / chip.bf16_flops,
        "memory": hbm_bytes / chip.hbm_bandwidth,
        "network": sum(sent.seconds(chip) for sent in network if sent.links),
    }
    if between := [sent for sent in network if not sent.links]:
        seconds["slices"] = sum(sent.seconds(chip) for sent in between)
    return Roofline(seconds, model_flops, chip.bf16_flops)


class Wiring:
    """A mesh on the links of a slice."""

    def __init__(self, mesh: Mesh, where: Slice) -> None:
        """Take down where each device of the mesh lies.

        Devices without coordinates, as those of a CPU, are laid out in their order.
        """
        self._sizes: Mapping[str, int] = dict(mesh.shape)
        self._shape, self._closed = where.shape, where.closed
        self.devices = mesh.size
        devices = list(mesh.devices.flat)
        places = [_place(device, i % where.chips, where.shape) for i, device in enumerate(devices)]
        self._places = np.array(places).reshape(*mesh.devices.shape, len(where.shape))

    def axes(self, members: Sequence[int]) -> tuple[str, ...]:
        """Mesh axes along which the devices of these numbers lie apart."""
        places = np.unravel_index(np.asarray(members, int), tuple(self._sizes.values()))
        return tuple(
            name for name, at in zip(self._sizes, places, strict=True) if len(set(at.tolist())) > 1
        )

    def links(self, axes: Sequence[str]) -> int:
        """Links that the chip with the fewest has to others of its group; 0 between slices."""
        if BETWEEN_SLICES in axes:
            return 0
        names = list(self._sizes)
        along = [names.index(name) for name in axes]
        others = [i for i in range(len(names)) if i not in along]
        groups = self._places.transpose(*others, *along, len(names))
        groups = groups.reshape(-1, math.prod(self._sizes[name] for name in axes), len(self._shape))
        return min(self._fewest(group) for group in groups)

    def sent(self, collectives: Any) -> tuple[Sent, ...]:
        """What one chip sends in all these collectives, by mesh axes."""
        found: dict[tuple[str, ...], float] = {}
        for one in collectives:
            axes = (BETWEEN_SLICES,) if one.leaves else self.axes(one.members)
            inside = tuple(name for name in axes if name != BETWEEN_SLICES)
            slices = self._sizes[BETWEEN_SLICES] if inside != axes else 1
            sizes = (0.0, one.wire_bytes) if one.leaves else one.over_slices(slices)
            for key, size in zip((inside, (BETWEEN_SLICES,)), sizes, strict=True):
                if size:
                    found[key] = found.get(key, 0.0) + one.times * size
        return tuple(
            Sent(",".join(axes), self.links(axes), size) for axes, size in sorted(found.items())
        )

    def _fewest(self, group: Any) -> int:
        """Links within a group of coordinates; 1 if none of its chips are neighbours."""
        members = {tuple(place) for place in group.tolist()}
        return max(1, min(len(self._neighbours(place) & members) for place in members))

    def _neighbours(self, place: tuple[int, ...]) -> set[tuple[int, ...]]:
        found = set()
        for i, step in itertools.product(range(len(place)), (-1, 1)):
            at, size = place[i] + step, self._shape[i]
            if self._closed[i]:
                at %= size
            if 0 <= at < size:
                found.add((*place[:i], at, *place[i + 1 :]))
        return found - {place}


def _place(device: Any, number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    coordinates = getattr(device, "coords", None)
    if coordinates is None:
        return tuple(int(at) for at in np.unravel_index(number, shape))
    return tuple(coordinates[: len(shape)])
