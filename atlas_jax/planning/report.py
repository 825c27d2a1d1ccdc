"""A plan as a table for the terminal and as JSON."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atlas_jax import __version__
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.planning.estimate import Work
from atlas_jax.planning.experts import rooms
from atlas_jax.planning.planner import Plan, ProgramPlan, mesh_name
from atlas_jax.planning.roofline import Roofline
from atlas_jax.planning.starting import Starting
from atlas_jax.training.chips import GIB

DISAGREEMENT = 0.1  # between counted and compiled FLOPs; a plan warns above it


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in the table and more, with the versions of the libraries."""
    run, chip = plan.run, plan.slice.chip
    recommended = plan.recommended
    return {
        "slice": plan.slice.name,
        "topology": plan.slice.topology,
        "chips": plan.slice.chips,
        "slices": plan.slices,
        "hbm_bytes_per_chip": chip.hbm_bytes,
        **run.told,
        **({"experts": [dataclasses.asdict(room) for room in rooms(run)]} if rooms(run) else {}),
        "recommended_mesh": mesh_name(recommended) if recommended else None,
        "possible_meshes": plan.possible,
        "tried": [_program_json(one) for one in plan.tried],
        "programs": [_program_json(one) for one in plan.programs],
        "starting": [_starting_json(one) for one in plan.starting],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the figures."""
    found = {"atlas-jax": __version__}
    for package in ("jax", "jaxlib", "flax", "optax", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _program_json(one: ProgramPlan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "program": one.program,
        "mesh": mesh_name(one.mesh),
        "fits": one.fits,
        "bytes_per_chip": one.memory.terms,
        "resident_bytes_per_chip": one.memory.resident,
        "peak_bytes_per_chip": one.memory.peak,
        "largest_index": one.largest_index,
        "advice": one.advice,
        "hints": one.hints,
        "warning": one.warning,
        "compiler_flops_per_chip_loops_once": one.compiler_flops,
        "counted_flops_per_chip_loops_once": one.counted_flops,
        "compile_seconds": round(one.compile_seconds, 1),
    }
    if one.work is not None and one.roof is not None:
        found |= {
            "flops_per_chip": one.work.flops,
            "model_flops_per_chip": one.work.model_flops,
            "compiled_flops_per_chip": one.work.compiled_flops,
            "compiled_to_counted_flops": one.work.agreement,
            "hbm_bytes_moved_per_chip": one.work.hbm_bytes,
            "collectives_per_chip": {
                kind: {"runs": runs, "bytes_sent": sent}
                for kind, (runs, sent) in one.work.collectives.items()
            },
            "network_per_chip": [dataclasses.asdict(sent) for sent in one.work.network],
            "windowed_bytes_per_chip": one.work.windowed_bytes,
        }
        found |= bounds_json(one.roof)
    return found


def _starting_json(one: Starting) -> dict[str, Any]:
    return {
        "program": one.program,
        "fits": one.fits,
        "bytes_per_chip": one.memory.terms,
        "peak_bytes_per_chip": one.memory.peak,
    }


def bounds_json(roof: Roofline) -> dict[str, Any]:
    """The bounds of a program, as they stand in the JSON."""
    return {
        "roofline_seconds": roof.seconds,
        "step_seconds": roof.step_seconds,
        "step_seconds_without_overlap": roof.apart_seconds,
        "binding": roof.binding,
        "mfu": roof.mfu,
        "mfu_without_overlap": roof.apart_mfu,
    }


def write_json(plan: Plan, path: str | Path) -> None:
    """Write `as_json` (to a temporary name, then renamed).

    Raises:
      UserError: the file cannot be written.
    """
    try:
        Path(path).parent.stat()  # a missing folder is probably a typing error, so it is not made
        with atomic_text(path) as file:
            file.write(json.dumps(as_json(plan), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path}: {error.strerror}") from None


def show(plan: Plan, console: Console) -> None:
    """Print the meshes tried, each program's memory and work, and the advice."""
    chip = plan.slice.chip
    several = f"{plan.slices} slices of " if plan.slices > 1 else ""
    console.print(
        f"{several}{plan.slice.name}: {plan.slice.chips} chips ({plan.slice.topology}), "
        f"{chip.hbm_bytes / GIB:.2f} GiB of HBM each for a program"
    )
    if len(plan.tried) > 1:
        console.print(_meshes_table(plan))
    console.print(_memory_table(plan.programs))
    if plan.starting:
        console.print(_memory_table(plan.starting))
    console.print(_work_table(plan))
    if plan.recommended is not None:
        console.print(f"recommended mesh: {mesh_name(plan.recommended)}" + _of_how_many(plan))
    for room in rooms(plan.run):
        console.print(
            f"{room.text} of {room.tokens} tokens: {room.experts} experts in {room.layers} layers, "
            f"each with {room.places} places"
        )
    for warning in dict.fromkeys(one.warning for one in plan.programs if one.warning):
        console.print(f"warning: {warning}")
    for one in plan.programs:
        if one.work is not None and abs(one.work.agreement - 1) > DISAGREEMENT:
            console.print(
                f"warning: {one.program}: the compiled program has {one.work.agreement:.0%} of the "
                "products that were counted; chips repeat work, or a loop's length was not read "
                "and traffic and collectives are off as well"
            )
        if one.largest_index:
            console.print(f"{one.program}: an index of {one.largest_index:,} passages would fit")
        for line in one.hints:
            console.print(f"{one.program}: {line}")
        for number, line in enumerate(one.advice):
            console.print(("  - " if number else f"{one.program} does not fit: ") + line)


def _of_how_many(plan: Plan) -> str:
    if len(plan.tried) < plan.possible:
        return (
            f", of the {len(plan.tried)} tried; the run divides over {plan.possible} "
            f"(--try_meshes={plan.possible} takes all)"
        )
    return f", of all {plan.possible} that the run divides over" if plan.possible else ""


def _meshes_table(plan: Plan) -> Table:
    table = Table(
        f"{plan.programs[0].program} on mesh", "peak GiB", "fits", "least seconds",
        "without overlap", "bound by",
    )  # fmt: skip
    for one in plan.tried:
        least = ["-"] * 3
        if one.roof:
            times = (one.roof.step_seconds, one.roof.apart_seconds)
            least = [*(f"{time:.3f}" for time in times), one.roof.binding]
        table.add_row(mesh_name(one.mesh), _gib(one.memory.peak), _yes(one.fits), *least)
    return table


def _memory_table(programs: Sequence[ProgramPlan | Starting]) -> Table:
    table = Table("GiB per chip", *(one.program for one in programs))
    for term in dict.fromkeys(term for one in programs for term in one.memory.terms):
        sizes = [one.memory.terms.get(term) for one in programs]
        table.add_row(term, *("" if size is None else _gib(size) for size in sizes))
    table.add_row("peak", *(_gib(one.memory.peak) for one in programs))
    table.add_row("fits", *(_yes(one.fits) for one in programs))
    return table


def _work_table(plan: Plan) -> Table:
    done = [one for one in plan.programs if one.work is not None]
    table = Table("per run and chip", *(one.program for one in done))

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(one.work, one.roof) for one in done))

    row("TFLOPs, rematerialisation included", lambda work, _: f"{work.flops / 1e12:.3f}")
    row("of them in the compiled program", lambda work, _: f"{work.agreement:.1%}")
    row("TFLOPs of the model", lambda work, _: f"{work.model_flops / 1e12:.3f}")
    row("HBM traffic, GiB", lambda work, _: _gib(work.hbm_bytes))
    for kind in dict.fromkeys(kind for one in done if one.work for kind in one.work.collectives):
        row(f"{kind}: runs, GiB sent", lambda work, _, kind=kind: _sent(work, kind))
    works = [one.work for one in done if one.work]
    for sent in dict.fromkeys((sent.axes, sent.links) for work in works for sent in work.network):
        row(_way(*sent), lambda work, _, sent=sent: _sent_over(work, *sent))
    for resource in dict.fromkeys(name for one in done if one.roof for name in one.roof.seconds):
        row(f"{resource}, s", lambda _, roof, name=resource: f"{roof.seconds.get(name, 0):.4f}")
    row("least time, s", lambda _, roof: f"{roof.step_seconds:.4f}")
    row("bound by", lambda _, roof: roof.binding)
    row("MFU at that time", lambda _, roof: f"{roof.mfu:.0%}")
    row("least time without overlap, s", lambda _, roof: f"{roof.apart_seconds:.4f}")
    row("MFU at that time", lambda _, roof: f"{roof.apart_mfu:.0%}")
    return table


def _sent(work: Work, kind: str) -> str:
    runs, sent = work.collectives.get(kind, (0, 0.0))
    return f"{runs}, {_gib(sent)}" if runs else ""


def _way(axes: str, links: int) -> str:
    way = {0: "between slices", 1: "1 link"}.get(links, f"{links} links")
    return f"over {axes} ({way}): GiB sent"


def _sent_over(work: Work, axes: str, links: int) -> str:
    size = sum(sent.bytes for sent in work.network if (sent.axes, sent.links) == (axes, links))
    return _gib(size) if size else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}" if size < 10 * GIB else f"{size / GIB:.2f}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "NO"
