"""Compiles a program of a run; counts its FLOPs, and takes its memory and its work."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from atlas_jax.core import partitioning
from atlas_jax.planning import flops
from atlas_jax.planning.estimate import Memory, compiled_memory, refused_memory
from atlas_jax.planning.programs import Program, lowered, make_program
from atlas_jax.planning.run import AnyRun

# The collectives are read from the text of a program. jaxlib cannot read this text if gathers run
# on SparseCores (v5p, v6e), so they are planned for the TensorCore.
READABLE = {"xla_tpu_offload_gather_to_sparsecore": "false"}


def compile_program(
    program: Program, run: AnyRun, mesh: Mesh, devices: Sequence[Any]
) -> tuple[Memory, Any | None]:
    """Compile a program; returns its memory and the program, None for one that does not fit."""
    try:
        options = READABLE if devices[0].platform == "tpu" else None
        compiled = lowered(program, run, mesh).compile(compiler_options=options)
        return compiled_memory(compiled, program.terms), compiled
    except jax.errors.JaxRuntimeError as error:
        memory = refused_memory(str(error), program.terms)
        if memory is None:
            raise
        return memory, None


def count_flops(program: Program, run: AnyRun, mesh: Mesh) -> tuple[float, float, float]:
    """FLOPs of the whole machine: all, loop bodies once, and without rematerialisation."""
    with partitioning.activate(mesh, run.rules):
        traced = jax.make_jaxpr(program.function)(*program.args)
    total = flops.matmul_flops(traced, program.loop_trips)
    once = flops.matmul_flops(traced, scan_once=True)
    plain = run.without_remat
    if plain == run:
        return total, once, total
    program = make_program(program.name, plain, mesh)
    with partitioning.activate(mesh, run.rules):
        traced = jax.make_jaxpr(program.function)(*program.args)
    return total, once, flops.matmul_flops(traced, program.loop_trips)


def compiler_flops(compiled: Any) -> float | None:
    """The compiler's own count for one chip, each loop body once; None if it has none."""
    found = compiled.cost_analysis()
    value = found.get("flops") if found else None
    return None if value is None or math.isnan(value) else float(value)
