"""Named meshes, T5X-style logical axis rules, and one strict sharding constraint.

Modules name the axes of their arrays (``batch``, ``embed``, ``heads``...). Rules map these names to
mesh axes as in T5X: the first match wins, and an array uses a mesh axis once. Nothing else in the
project mentions a mesh axis, except the passage index. No rule applies to it: it is spread over all
devices of a slice (``index_axes``), and each slice has a copy.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
from flax.core import meta
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from msgspec import Meta

from atlas_jax.core import bounds
from atlas_jax.core.errors import UserError

SLICE_AXES = ("data", "fsdp", "expert", "model")
MESH_AXES = ("dcn", *SLICE_AXES)

LOGICAL_AXES = frozenset(
    {
        "batch", "rows", "passages", "length", "source", "target", "embed", "embedding", "heads",
        "kv", "joined_kv", "mlp", "vocab", "relpos_buckets", "layers", "index", "unsharded",
        "expert", "expert_group", "expert_mlp", "unmodeled",
        # No model here has these; T5X's standard rules name them.
        "abspos_buckets", "stack", "mlp_activations",
    }
)  # fmt: skip

Rule = tuple[str, str | tuple[str, ...] | None]

STANDARD_RULES: tuple[Rule, ...] = (
    ("rows", MESH_AXES),  # passages that are encoded, each on its own: `passage_rows`
    ("batch", ("dcn", "data", "fsdp", "expert")),
    ("expert", "expert"),
    ("expert_group", ("dcn", "data", "fsdp")),  # texts whose tokens are with their experts
    ("index", SLICE_AXES),  # the queue of contrastive pretraining; a passage index: `index_axes`
    ("vocab", "model"),
    ("mlp", "model"),
    ("expert_mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
)


_Devices = Annotated[int, Meta(ge=-1, le=1 << 20)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "all remaining devices".

    Attributes:
      data: splits the batch; each part has a copy of the parameters.
      fsdp: splits the batch, and the width of every parameter and of its moments.
      model: splits heads, MLP and vocabulary, in parameters and activations.
      dcn: number of slices, joined by the data-centre network; each has data x fsdp x expert x
        model devices.
      expert: splits the batch, and the experts of Switch layers.
    """

    data: _Devices = -1
    fsdp: _Devices = 1
    model: _Devices = 1
    dcn: _Devices = 1
    expert: _Devices = 1

    def __post_init__(self) -> None:
        """Refuse values that are not a number of devices."""
        bounds.check(self)


@dataclasses.dataclass(frozen=True)
class PartitionRules:
    """Which mesh axis splits which axis of an array.

    Attributes:
      rules: T5X's logical axis rules, pairs of (logical axis, mesh axis or axes or None). The
        first match wins.
    """

    rules: Sequence[Rule] = STANDARD_RULES

    def __post_init__(self) -> None:
        """Refuse an unknown name on either side.

        Raises:
          UserError: names the rule at fault.
        """
        for logical, target in self.rules:
            _check_known(logical)
            for axis in _as_tuple(target):
                if axis not in MESH_AXES:
                    raise UserError(
                        f"PartitionRules.rules: {logical!r} is mapped to the mesh axis {axis!r}; "
                        f"the mesh axes are {', '.join(MESH_AXES)}"
                    )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices by `MESH_AXES`; with TPUs, dcn counts their slices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or dcn is not the number
        of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"MeshConfig: sizes {sizes} need to be positive, with at most one -1")
    known = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis}={s}" for axis, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(
            f"MeshConfig: {shape} does not use the {len(devices)} devices exactly; "
            "the product of dcn, data, fsdp, expert and model has to equal their number"
        )
    # Auto axes: the Explicit default of jax.make_mesh refuses linen's constraints.
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = _slices(devices)
    if slices == 1:  # or devices that simulate several slices
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)
    if sizes[0] != slices:
        raise UserError(
            f"MeshConfig.dcn = {sizes[0]}, but the {len(devices)} devices lie on {slices} slices: "
            f"bind MeshConfig.dcn = {slices}, and data x fsdp x expert x model to the devices of "
            "one"
        )
    arranged = create_hybrid_device_mesh(
        (1, *sizes[1:]), (slices, *(1 for _ in SLICE_AXES)), devices
    )
    return Mesh(arranged, MESH_AXES, axis_types=types)


def _slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices of the devices; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})  # one slice has none


def index_axes(mesh: Mesh) -> tuple[str, ...]:
    """Axes over which the rows of an index are spread: all but the one between slices.

    Each slice has the whole index and searches it for its own queries. So a search sends nothing
    over the data-centre network.
    """
    return tuple(axis for axis in mesh.axis_names if axis != "dcn")


def index_parts(mesh: Mesh) -> int:
    """Number of parts into which the rows of an index are split."""
    return math.prod(mesh.shape[axis] for axis in index_axes(mesh))


def over_slices(mesh: Mesh, rows: int) -> PartitionSpec:
    """Sharding of so many queries in a search: split over the slices if they divide."""
    slices = mesh.shape.get("dcn", 1)
    return PartitionSpec("dcn") if slices > 1 and rows % slices == 0 else PartitionSpec()


@dataclasses.dataclass(frozen=True)
class _Active:
    mesh: Mesh
    rules: tuple[Rule, ...]


_ACTIVE: contextvars.ContextVar[_Active | None] = contextvars.ContextVar("active", default=None)
_PASSAGE_ROWS: contextvars.ContextVar[bool] = contextvars.ContextVar("passage_rows", default=False)


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Sequence[Rule] = STANDARD_RULES) -> Iterator[Mesh]:
    """Make mesh and rules current for ``constrain``.

    Both are local to the thread, so each thread that traces a step must activate them. A traced
    function keeps the rules under which it was traced, so activate before the first call.
    """
    token = _ACTIVE.set(_Active(mesh, tuple(rules)))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _ACTIVE.reset(token)


def active_mesh() -> Mesh | None:
    """The mesh that ``activate`` made current in this thread, if any."""
    active = _ACTIVE.get()
    return active.mesh if active else None


@contextlib.contextmanager
def passage_rows() -> Iterator[None]:
    """Make ``constrain`` read the axis ``batch`` as ``rows``: passages, each on its own.

    There are k times as many of them as queries. So they divide over the `model` axis too, and a
    layer then sends its parameters instead of all its activations. Rows that do not divide over
    the mesh axes of ``rows``, rules without ``rows`` and several slices lie as ``batch`` says.
    """
    token = _PASSAGE_ROWS.set(True)
    try:
        yield
    finally:
        _PASSAGE_ROWS.reset(token)


def _as_rows(x: Any, names: tuple[str | None, ...], active: _Active) -> tuple[str | None, ...]:
    """The axis names with ``rows`` in place of ``batch``, if it divides."""
    axes = next((_as_tuple(to) for logical, to in active.rules if logical == "rows"), None)
    if axes is None or "batch" not in names or active.mesh.shape.get("dcn", 1) > 1:
        return names  # over several slices the equality is not tested yet
    size = x.shape[names.index("batch")]
    if size % math.prod(active.mesh.shape.get(axis, 1) for axis in axes):
        return names
    return tuple("rows" if name == "batch" else name for name in names)


def logical_to_spec(
    logical_axes: Sequence[str | None], rules: Sequence[Rule] = STANDARD_RULES
) -> PartitionSpec:
    """Map logical axis names to mesh axes: rules in order, each mesh axis used once.

    Raises:
      ValueError: an axis name that is not in ``LOGICAL_AXES``.
    """
    for name in logical_axes:
        if name is not None:
            _check_known(name)
    assigned: list[Any] = [None] * len(logical_axes)
    done = [name is None for name in logical_axes]
    used: set[str] = set()
    for logical, target in rules:
        axes = _as_tuple(target)
        if used.intersection(axes):
            continue
        for position, name in enumerate(logical_axes):
            if name == logical and not done[position]:
                assigned[position] = target
                done[position] = True
                used.update(axes)
                break
    return PartitionSpec(*assigned)


def constrain(x: Any, *logical_axes: str | None) -> Any:
    """Constrain the sharding of an activation by the names of its axes.

    Without an active mesh it only checks the names. A misspelt axis would otherwise be replicated
    without an error.

    Args:
      x: array of rank ``len(logical_axes)``.
      *logical_axes: one logical name (or None) per axis.

    Raises:
      ValueError: unknown axis name, or a rank that differs from the number of names.
    """
    if len(logical_axes) != x.ndim:
        raise ValueError(f"{len(logical_axes)} axis names {logical_axes} for shape {x.shape}")
    active = _ACTIVE.get()
    if active and _PASSAGE_ROWS.get():
        logical_axes = _as_rows(x, logical_axes, active)
    spec = logical_to_spec(logical_axes, active.rules if active else STANDARD_RULES)
    if active is None or active.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(active.mesh, spec))


def active_spec(shape: Sequence[int], *logical_axes: str | None) -> PartitionSpec:
    """Mesh axes of an activation of this shape, for a function that runs on each device's part.

    As `constrain` lays it out, but whole on every device along an axis that does not divide.
    Without an active mesh nothing is split.

    Raises:
      ValueError: unknown axis name.
    """
    active = _ACTIVE.get()
    if active is None:
        return PartitionSpec(*[None] * len(shape))
    if _PASSAGE_ROWS.get():
        logical_axes = _as_rows(jax.ShapeDtypeStruct(shape, bool), logical_axes, active)
    spec = logical_to_spec(logical_axes, active.rules)
    parts = [math.prod(active.mesh.shape[a] for a in _as_tuple(axes)) for axes in spec]
    return PartitionSpec(
        *(
            axes if size % count == 0 else None
            for size, count, axes in zip(shape, parts, spec, strict=True)
        )
    )


def param_shardings(boxed: Any, mesh: Mesh, rules: Sequence[Rule] = STANDARD_RULES) -> Any:
    """Shardings of a (possibly abstract) tree of parameters boxed with their axis names.

    Args:
      boxed: tree whose leaves are ``LogicallyPartitioned`` boxes or bare arrays.

    Returns:
      Tree of ``NamedSharding`` with the structure of ``meta.unbox(boxed)``.

    Raises:
      UserError: a dimension that its mesh axes do not divide, with the parameter's name.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, meta.AxisMetadata) else (None,) * leaf.ndim  # type: ignore[attr-defined]
        shape = meta.unbox(leaf).shape
        spec = logical_to_spec(names, rules)
        for size, axes, name in zip(shape, spec, names, strict=True):
            parts = math.prod(mesh.shape[a] for a in _as_tuple(axes))
            if size % parts:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: axis "
                    f"{name!r} of size {size} is not divisible by mesh axes {axes} ({parts} ways)"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _check_known(name: str) -> None:
    if name not in LOGICAL_AXES:
        raise UserError(
            f"unknown logical axis {name!r}; known are {', '.join(sorted(LOGICAL_AXES))}"
        )


def batch_sharding(
    binding: str, batch_size: int, mesh: Mesh, rules: tuple[Rule, ...]
) -> NamedSharding:
    """Sharding of the rows of a batch.

    Raises:
      UserError: the batch size, which `binding` set, does not divide over the data axes.
    """
    parts = batch_parts(mesh, rules)
    if batch_size % parts:
        raise UserError(
            f"{binding} = {batch_size} does not divide over the {parts} parts of the mesh that "
            f"hold a batch; use a multiple of {parts}"
        )
    return NamedSharding(mesh, logical_to_spec(("batch",), rules))


def filled_batch(rows: int, mesh: Mesh, rules: tuple[Rule, ...]) -> int:
    """`rows`, rounded up to a multiple of the parts of a batch."""
    parts = batch_parts(mesh, rules)
    return -(-rows // parts) * parts


def batch_parts(mesh: Mesh, rules: tuple[Rule, ...]) -> int:
    """Number of parts of the mesh over which the rows of a batch are spread."""
    axes = logical_to_spec(("batch",), rules)[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def active_batch_parts() -> int:
    """``batch_parts`` of what ``activate`` made current in this thread; 1 without any."""
    active = _ACTIVE.get()
    return batch_parts(active.mesh, active.rules) if active else 1
