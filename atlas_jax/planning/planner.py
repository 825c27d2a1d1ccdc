"""Compile a run's programs for a slice; measure the memory and the work of each chip."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MESH_AXES, MeshConfig
from atlas_jax.planning.advice import Case, advise, shared, windowed
from atlas_jax.planning.compiled import compile_program, compiler_flops, count_flops
from atlas_jax.planning.estimate import Memory, Work, largest_index, measure, resident_memory
from atlas_jax.planning.meshes import candidates
from atlas_jax.planning.programs import make_program, refused_batch, resident
from atlas_jax.planning.roofline import Roofline, Wiring, roofline
from atlas_jax.planning.run import AnyRun
from atlas_jax.planning.starting import START, Starting, plan_starting
from atlas_jax.training.chips import Slice

INSTALL_HINT = (
    "plan needs libtpu, whose compiler works without any TPU: pip install 'atlas-jax[plan]' "
    "(about 480 MB)"
)


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program on one mesh.

    Attributes:
      fits: whether there is room for it beside the run's other arrays.
      memory: of the program. If the arrays that stay for the whole run are larger than the HBM,
        only these; the program is then not compiled.
      warning: why a run would stop, other than for memory; else empty.
      work, roof: None if the program was not compiled or the compiler refused it.
      largest_index: number of passages that would fit; None for programs without an index, or if
        the arguments alone are too large.
      hints: what would make it faster.
      compiler_flops, counted_flops: per chip, each loop body once: by the compiler's analysis
        and by our own count, for comparison.
      compile_seconds: on this machine.
    """

    program: str
    mesh: MeshConfig
    fits: bool
    memory: Memory
    work: Work | None
    roof: Roofline | None
    largest_index: int | None
    advice: list[str]
    warning: str
    compiler_flops: float | None
    counted_flops: float | None
    compile_seconds: float
    hints: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice.

    Attributes:
      tried: the run's first program (for training, the train step) on all meshes tried.
      programs: all programs on the recommended mesh, if one fits.
      possible: number of meshes over which the run divides; 0 if the meshes were given.
      slices: of this kind, joined by the data-centre network.
      starting: how a training comes to its state there; none for other runs.
    """

    slice: Slice
    run: AnyRun
    tried: list[ProgramPlan]
    programs: list[ProgramPlan]
    possible: int = 0
    slices: int = 1
    starting: Sequence[Starting] = ()

    @property
    def goes(self) -> bool:
        """Whether everything fits and nothing stops the run."""
        runs = all(one.fits and not one.warning for one in self.programs)
        return runs and all(one.fits for one in self.starting)

    @property
    def recommended(self) -> MeshConfig | None:
        """Of the meshes that fit, the one with the shortest step, between its two bounds."""
        best = best_of(self.tried)
        return best.mesh if best else None


def tpu_devices(where: Slice, slices: int = 1) -> Sequence[Any]:
    """Devices of one or several equal slices that need not exist, to compile ahead of time.

    Raises:
      UserError: libtpu is not installed.
    """
    # The compiler must not look for chips here, and several may compile at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(INSTALL_HINT) from None
    from jax.experimental import topologies

    options = where.topology_options | ({"num_slices": slices} if slices > 1 else {})
    description = topologies.get_topology_desc(where.topology, "tpu", **options)
    return description.devices


def make_plan(
    run: AnyRun,
    where: Slice,
    devices: Sequence[Any],
    meshes: Sequence[MeshConfig] = (),
    try_meshes: int = 3,
    programs: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
    slices: int = 1,
) -> Plan:
    """Compile the run's first program on some meshes, and the others on the best of them.

    Args:
      run: the run's settings.
      where: the slice; its chip sets the limits.
      devices: one for each chip of all slices.
      meshes: those to try; none: the `try_meshes` most promising ones.
      programs: those to compile after the first one, and `start` for how a training comes to its
        state; none: all of them.
      report: called with a line before and after each compilation.
      slices: how many of them the data-centre network joins; each mesh has them as `dcn`.

    Raises:
      UserError: a mesh does not divide the run.
    """
    first, *rest = run.programs
    possible = [] if meshes else candidates(run, devices, where.chip.hbm_bytes, slices)
    chosen = list(meshes) or possible[:try_meshes]
    tried = [plan_program(first, run, config, where, devices, report) for config in chosen]
    best = best_of(tried) or min(tried, key=lambda p: (not p.memory.is_whole, p.memory.peak))
    others = [
        plan_program(name, run, best.mesh, where, devices, report)
        for name in rest
        if name in (programs or rest)
    ]
    starting: Sequence[Starting] = ()
    if not programs or START in programs:
        starting = plan_starting(run, best.mesh, where.chip.hbm_bytes, devices)
    return Plan(where, run, tried, [best, *others], len(possible), slices, starting)


def best_of(plans: Sequence[ProgramPlan]) -> ProgramPlan | None:
    """Of the plans that fit, the one with the shortest step between its bounds; else None."""
    fitting = [
        (plan.roof.middle_seconds, i) for i, plan in enumerate(plans) if plan.fits and plan.roof
    ]
    return plans[min(fitting)[1]] if fitting else None


def plan_program(
    name: str,
    run: AnyRun,
    config: MeshConfig,
    where: Slice,
    devices: Sequence[Any],
    report: Callable[[str], None] = lambda line: None,
) -> ProgramPlan:
    """Lower and compile one program on one mesh and take its figures."""
    mesh, chip = partitioning.make_mesh(config, devices), where.chip
    config = MeshConfig(**{axis: mesh.shape[axis] for axis in MESH_AXES})
    program, started = make_program(name, run, mesh), time.monotonic()
    beside = resident(program, run, mesh)
    memory = resident_memory(program.terms).beside(beside)
    compiled, total, once, plain = None, 0.0, None, 0.0
    if memory.peak <= chip.hbm_bytes:
        report(f"{name} on {mesh_name(config)}: compiling")
        total, once, plain = count_flops(program, run, mesh)
        memory, compiled = compile_program(program, run, mesh, devices)
        memory = memory.beside(beside)
    seconds, work, roof = time.monotonic() - started, None, None
    if compiled is not None:
        wiring = Wiring(mesh, where)
        work = measure(compiled.as_text(), total, plain, wiring, program.loop_trips)
        roof = roofline(work.flops, work.model_flops, work.hbm_bytes, work.network, chip)
    fits = compiled is not None and memory.peak <= chip.hbm_bytes
    largest = None
    if memory.is_whole and any(term.startswith("index") for term in program.terms):
        rows = run.batch_of(name)[1]
        largest = largest_index(memory, chip, where.chips, run.row_bytes, rows)
    case, hints = Case(name, run, config, devices), list[str]()
    if work and roof:
        hints = [*windowed(work, roof, chip), *shared(case, roof)]
    report(f"{name} on {mesh_name(config)}: {'fits' if fits else 'does not fit'}, {seconds:.0f} s")
    return ProgramPlan(
        program=name,
        mesh=config,
        fits=fits,
        memory=memory,
        work=work,
        roof=roof,
        largest_index=largest,
        advice=advise(case, memory, chip.hbm_bytes),
        hints=hints,
        warning=refused_batch(name, run, mesh),
        compiler_flops=None if compiled is None else compiler_flops(compiled),
        counted_flops=None if once is None else once / len(devices),
        compile_seconds=seconds,
    )


_RARE = ("dcn", "expert")


def mesh_name(config: MeshConfig) -> str:
    """`data=1 fsdp=64 model=4`; `dcn` and `expert` only where they divide something."""
    axes = [axis for axis in MESH_AXES if axis not in _RARE or getattr(config, axis) != 1]
    return " ".join(f"{axis}={getattr(config, axis)}" for axis in axes)
