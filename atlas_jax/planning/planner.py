"""Compile a run's programs for a slice; measure the memory and the work of each chip."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import SLICE_AXES, MeshConfig
from atlas_jax.models.parameters import Models
from atlas_jax.planning import flops
from atlas_jax.planning.advice import Case, advise
from atlas_jax.planning.estimate import (
    Memory,
    Roofline,
    Work,
    compiled_memory,
    largest_index,
    measure,
    refused_memory,
    resident_memory,
    roofline,
)
from atlas_jax.planning.meshes import candidates
from atlas_jax.planning.programs import Program, lowered, make_program, refused_batch, resident
from atlas_jax.planning.run import Run
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.dual_encoder import DualEncoder
from atlas_jax.training.chips import Chip, Slice

# The collectives are read from the text of a program. jaxlib cannot read this text if gathers run
# on SparseCores (v5p, v6e), so they are planned for the TensorCore.
READABLE = {"xla_tpu_offload_gather_to_sparsecore": "false"}
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice.

    Attributes:
      tried: the run's first program (for training, the train step) on all meshes tried.
      programs: all programs on the recommended mesh, if one fits.
      possible: number of meshes over which the run divides; 0 if the meshes were given.
    """

    slice: Slice
    run: Run
    tried: list[ProgramPlan]
    programs: list[ProgramPlan]
    possible: int = 0

    @property
    def recommended(self) -> MeshConfig | None:
        """Of the meshes that fit, the one with the shortest step."""
        best = best_of(self.tried)
        return best.mesh if best else None


def tpu_devices(where: Slice) -> Sequence[Any]:
    """Devices of a slice that need not exist, for compilation ahead of time.

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

    description = topologies.get_topology_desc(where.topology, "tpu", **where.topology_options)
    return description.devices


def make_plan(
    run: Run,
    where: Slice,
    devices: Sequence[Any],
    meshes: Sequence[MeshConfig] = (),
    try_meshes: int = 2,
    programs: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile the run's first program on some meshes, and the others on the best of them.

    Args:
      run: the run's settings.
      where: the slice; its chip sets the limits.
      devices: one for each chip of the slice.
      meshes: those to try; none: the `try_meshes` most promising ones.
      programs: those to compile after the first one; none: all of the run.
      report: called with a line before and after each compilation.

    Raises:
      UserError: a mesh does not divide the run.
    """
    first, *rest = run.programs
    possible = [] if meshes else candidates(run, devices, where.chip.hbm_bytes)
    chosen = list(meshes) or possible[:try_meshes]
    tried = [plan_program(first, run, config, where.chip, devices, report) for config in chosen]
    best = best_of(tried) or min(tried, key=lambda p: (not p.memory.is_whole, p.memory.peak))
    others = [
        plan_program(name, run, best.mesh, where.chip, devices, report)
        for name in rest
        if name in (programs or rest)
    ]
    return Plan(where, run, tried, [best, *others], len(possible))


def best_of(plans: Sequence[ProgramPlan]) -> ProgramPlan | None:
    """Of the plans that fit, the one with the shortest step; None if none fits."""
    fitting = [
        (plan.roof.step_seconds, i) for i, plan in enumerate(plans) if plan.fits and plan.roof
    ]
    return plans[min(fitting)[1]] if fitting else None


def plan_program(
    name: str,
    run: Run,
    config: MeshConfig,
    chip: Chip,
    devices: Sequence[Any],
    report: Callable[[str], None] = lambda line: None,
) -> ProgramPlan:
    """Lower and compile one program on one mesh and take its figures."""
    mesh = partitioning.make_mesh(config, devices)
    config = MeshConfig(**{axis: mesh.shape[axis] for axis in SLICE_AXES})
    program, started = make_program(name, run, mesh), time.monotonic()
    beside = resident(program, run, mesh)
    memory = resident_memory(program.terms).beside(beside)
    compiled, total, once, plain = None, 0.0, None, 0.0
    if memory.peak <= chip.hbm_bytes:
        report(f"{name} on {mesh_name(config)}: compiling")
        total, once, plain = _count_flops(program, run, mesh)
        memory, compiled = _compiled(program, run, mesh, devices)
        memory = memory.beside(beside)
    seconds, work = time.monotonic() - started, None
    compiler_flops = None
    if compiled is not None:
        work = measure(compiled.as_text(), total, plain, len(devices), program.loop_trips)
        compiler_flops = _compiler_flops(compiled)
    fits = compiled is not None and memory.peak <= chip.hbm_bytes
    largest = None
    if memory.is_whole and any(term.startswith("index") for term in program.terms):
        rows = run.batch_of(name)[1]
        largest = largest_index(memory, chip, len(devices), run.row_bytes, rows)
    report(f"{name} on {mesh_name(config)}: {'fits' if fits else 'does not fit'}, {seconds:.0f} s")
    return ProgramPlan(
        program=name,
        mesh=config,
        fits=fits,
        memory=memory,
        work=work,
        roof=roofline(work, chip) if work else None,
        largest_index=largest,
        advice=advise(Case(name, run, config, devices), memory, chip.hbm_bytes),
        warning=refused_batch(name, run, mesh),
        compiler_flops=compiler_flops,
        counted_flops=None if once is None else once / len(devices),
        compile_seconds=seconds,
    )


def _compiled(
    program: Program, run: Run, mesh: Mesh, devices: Sequence[Any]
) -> tuple[Memory, Any | None]:
    """Compile a program; returns its memory, and None in place of a program that has no room."""
    try:
        options = READABLE if devices[0].platform == "tpu" else None
        compiled = lowered(program, run, mesh).compile(compiler_options=options)
        return compiled_memory(compiled, program.terms), compiled
    except jax.errors.JaxRuntimeError as error:
        memory = refused_memory(str(error), program.terms)
        if memory is None:
            raise
        return memory, None


def mesh_name(config: MeshConfig) -> str:
    """`data=1 fsdp=64 model=4`."""
    return " ".join(f"{axis}={getattr(config, axis)}" for axis in SLICE_AXES)


def _count_flops(program: Program, run: Run, mesh: Mesh) -> tuple[float, float, float]:
    """FLOPs of the whole machine: all, loop bodies once, and without rematerialisation."""
    with partitioning.activate(mesh, run.rules):
        traced = jax.make_jaxpr(program.function)(*program.args)
    total = flops.matmul_flops(traced, program.loop_trips)
    once = flops.matmul_flops(traced, scan_once=True)
    plain = dataclasses.replace(run, models=_without_remat(run.models))
    if plain.models == run.models:
        return total, once, total
    program = make_program(program.name, plain, mesh)
    with partitioning.activate(mesh, run.rules):
        traced = jax.make_jaxpr(program.function)(*program.args)
    return total, once, flops.matmul_flops(traced, program.loop_trips)


def _without_remat(models: Models) -> Models:
    reader = dataclasses.replace(models.reader.config, remat_policy="none")
    retriever = dataclasses.replace(models.retriever.config, remat_policy="none")
    return Models(T5(reader), DualEncoder(retriever))


def _compiler_flops(compiled: Any) -> float | None:
    found = compiled.cost_analysis()
    value = found.get("flops") if found else None
    return None if value is None or math.isnan(value) else float(value)
