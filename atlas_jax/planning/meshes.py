"""Meshes of a slice that make sense for a run, the most promising first."""

import math
from collections.abc import Iterator
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, batch_sharding, make_mesh
from atlas_jax.planning.estimate import shard_bytes
from atlas_jax.planning.experts import experts_of
from atlas_jax.planning.programs import held
from atlas_jax.planning.run import AnyRun

MAX_MODEL = 16  # tensor parallelism beyond this sends more than it computes
# Share of the HBM for arrays that stay for the whole run; the rest is for the step.
RESIDENT_SHARE = 0.6


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def candidates(run: AnyRun, devices: Any, hbm_bytes: int, slices: int = 1) -> list[MeshConfig]:
    """Meshes over which batch, heads and parameters divide, the most promising first.

    Fewer chips per copy of a layer means less communication, so `model` is as small as the batch
    allows. Experts are spread no further than needed. Copying the state (`data`) and spreading it
    (`fsdp`) are both tried, where it has room:
    which is quicker, only the compiled program tells. Then come meshes that spread it as far as
    needed to leave room for a step.

    Raises:
      UserError: no mesh fits; says why the last one did not.
    """
    n, refused = len(devices) // slices, ""
    found, roomy = list[tuple[tuple[float, int, int, int], MeshConfig]](), list[MeshConfig]()
    for config in _shapes(n, slices, experts_of(run)):
        try:
            resident = _resident(run, config, devices)
        except UserError as error:
            refused = str(error)
            continue
        crowded = max(0.0, resident - RESIDENT_SHARE * hbm_bytes)
        found.append(((crowded, config.model, config.fsdp, config.expert), config))
        if resident <= hbm_bytes:
            roomy.append(config)
    if not found:
        raise UserError(f"no mesh over {n} chips divides this run: {refused}")
    found.sort(key=lambda entry: entry[0])
    ordered = [config for _, config in found]
    return list(dict.fromkeys([*_data_and_fsdp(roomy), *_spread_first(ordered)]))


def _shapes(chips: int, slices: int, experts: int) -> Iterator[MeshConfig]:
    """Every way to divide a slice's chips; over experts only where there are some."""
    for model in divisors(chips):
        if model > MAX_MODEL:
            continue
        for fsdp in divisors(chips // model):
            rest = chips // model // fsdp
            for expert in divisors(math.gcd(rest, experts) if experts else 1):
                yield MeshConfig(rest // expert, fsdp, model, slices, expert)


def divides(run: AnyRun, config: MeshConfig, devices: Any) -> bool:
    """Whether batch, heads and parameters divide over a mesh of all these devices."""
    try:
        _resident(run, config, devices)
    except UserError:
        return False
    return True


def _data_and_fsdp(roomy: list[MeshConfig]) -> list[MeshConfig]:
    """With the smallest `model`: the mesh that copies the state most, and that which does least."""
    if not roomy:
        return []
    model = min(config.model for config in roomy)
    same = [config for config in roomy if config.model == model]
    return [min(same, key=lambda config: config.fsdp), max(same, key=lambda config: config.fsdp)]


def _spread_first(ordered: list[MeshConfig]) -> list[MeshConfig]:
    """The best mesh of each `model` size before the second best of any."""
    ranks: dict[int, int] = {}
    keyed = []
    for position, config in enumerate(ordered):
        rank = ranks[config.model] = ranks.get(config.model, -1) + 1
        keyed.append(((rank, position), config))
    return [config for _, config in sorted(keyed, key=lambda entry: entry[0])]


def _resident(run: AnyRun, config: MeshConfig, devices: Any) -> int:
    """Bytes of the arrays that stay on each chip for the whole run.

    Raises:
      UserError: something does not divide.
    """
    _check_heads(run, config)
    mesh = make_mesh(config, devices)
    batch_sharding(*run.batch_of(run.programs[0]), mesh, run.rules)
    return sum(shard_bytes(tree) for tree in held(run, mesh).values())


def _check_heads(run: AnyRun, config: MeshConfig) -> None:
    for name, heads in run.heads.items():
        if heads % config.model:
            raise UserError(f"{name}.num_heads = {heads} do not divide over model={config.model}")
