"""The tables of docs/reports/plan_table.md: `atlas-jax plan` for models, recipes and slices.

    python -m benchmarks.plan_table [--minutes 60] [--row_minutes 30] [--only xxl]

Each row is a process of its own. As soon as it is done it stands in docs/reports/plan_rows.json,
with the versions that gave it and a digest of what went in: the run's gin configuration and
the code that reads compiled programs. A second call makes the rows that are missing, those
without their start, and those whose versions or digest differ. What runs out of time is left for
the next call. Times and MFU are computed anew from the work that a row holds, without compiling:
`recomputed`.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.config import clear_gin, config_text, load_gin
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.plan import UNREAD
from atlas_jax.planning.report import DISAGREEMENT, bounds_json, versions
from atlas_jax.planning.roofline import Sent, roofline
from atlas_jax.training.chips import GIB, Slice
from benchmarks.plan_rows import PASSAGES, RECIPES, ROW_LIST, Row

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "docs" / "reports"
ROWS, TABLE = REPORTS / "plan_rows.json", REPORTS / "plan_table.md"
_TIMES = ("step_seconds", "step_seconds_without_overlap")
# What makes figures of a program. Times are none of them: they are recomputed.
READING = (
    "planning/compiled", "planning/estimate", "planning/flops", "planning/hlo",
    "planning/hlo_text", "planning/products", "planning/programs", "planning/run",
    "planning/traffic",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Make rows that are missing or stale until the time is up, then write the page; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after this")
    parser.add_argument("--row_minutes", type=float, default=30, help="give a row up after this")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    flags = parser.parse_args(argv)
    rows, end = _read_rows(), time.monotonic() + 60 * flags.minutes
    for row in ROW_LIST:
        if row.name in rows:
            rows[row.name]["plan"] = recomputed(row, rows[row.name]["plan"])
    if rows:
        _write(ROWS, json.dumps(rows, indent=1, sort_keys=True) + "\n")
    for row in ROW_LIST:
        made = rows.get(row.name)
        if flags.only not in row.name or (made and is_whole(row, made) and not is_stale(row, made)):
            continue
        if time.monotonic() > end:
            print(f"{row.name}: left for the next call")
            continue
        started, inputs = time.monotonic(), digest(row)
        plan = _plan(row, 60 * flags.row_minutes)
        taken = time.monotonic() - started
        print(f"{row.name}: {'done' if plan else 'no result'} in {taken:.0f} s", flush=True)
        if plan:
            rows[row.name] = {"bindings": row.bindings, "inputs": inputs, "plan": plan}
            _write(ROWS, json.dumps(rows, indent=1, sort_keys=True) + "\n")
            _write(TABLE, page(rows))
    _write(TABLE, page(rows))
    return 0


def recomputed(row: Row, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with bounds from the work that it holds and today's figures of the chip."""
    return plan | {
        part: [_bounds(one, row) for one in plan[part]] for part in ("programs", "tried")
    }


def _bounds(one: dict[str, Any], row: Row) -> dict[str, Any]:
    if "network_per_chip" not in one:
        return one  # not compiled
    network = [Sent(**sent) for sent in one["network_per_chip"]]
    work = (one["flops_per_chip"], one["model_flops_per_chip"], one["hbm_bytes_moved_per_chip"])
    return one | bounds_json(roofline(*work, network, row.slice.chip))


def is_whole(row: Row, made: dict[str, Any]) -> bool:
    """Whether a row has how it starts, if it has to."""
    return "start" not in row.programs or bool(made["plan"].get("starting"))


def is_stale(row: Row, made: dict[str, Any]) -> bool:
    """Whether a row was made with other versions, another configuration or another reading."""
    return made["plan"]["versions"] != versions() or made.get("inputs") != digest(row)


def digest(row: Row) -> str:
    """Of what a row was made of, besides its versions: configuration, mesh, reading of programs.

    The code of models and step is not in it: that takes minutes to compile, and changes often
    without changing what compiles.
    """
    load_gin(row.files, row.bindings, unread=UNREAD)
    limits = (row.slice.chip.hbm_bytes, row.slice.shape, row.slice.closed)
    whole = (config_text(), row.where, row.mesh, row.passages, limits, _reading())
    clear_gin()
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]


@functools.cache
def _reading() -> str:
    """The code that makes figures of compiled programs, without comments and docstrings."""
    found = []
    for name in READING:
        tree = ast.parse((ROOT / "atlas_jax" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        found.append(ast.unparse(tree))  # unlike `ast.dump` the same in every Python
    return "\n".join(found)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def page(rows: dict[str, Any]) -> str:
    """The rows as a page of Markdown: the smallest slices that fit, then all of `ROW_LIST`."""
    found, usual = _common_versions(rows), [row for row in ROW_LIST if row.passages == PASSAGES]
    stale = {
        row.name
        for row in ROW_LIST
        if row.name in rows
        and (
            rows[row.name].get("inputs") != digest(row)
            or rows[row.name]["plan"]["versions"] != found
        )
    }
    lines = [
        "# What fits where",
        "",
        "`make plan-table` writes this page from `plan_rows.json`. [Does it fit?](../plan.md) says",
        "what the columns mean. All rows of the first two tables are of a train step with",
        f"{PASSAGES:,} passages.",
        "Sizes are in GiB per chip. Seconds and MFU are bounds: with and without overlap of",
        "products and collectives. A reader input is padded to its full length, or passages",
        "[share rows](../packing.md): as many as those of 170 tokens on average need. Then MFU is",
        "of the rows that are read. `fused` is [fused attention](../fused_attention.md) in the",
        "reader, whose kernels state their own FLOPs and bytes. The recipes:",
        "",
        *_recipes(rows),
        "",
        "Some seconds and MFU have a `?` behind them. There the compiled program",
        f"has over {DISAGREEMENT:.0%} more or fewer products than were counted before.",
        "Either chips repeat work, or the length of a loop was not read.",
        "",
        "## The smallest slice that fits",
        "",
        "Of the slices that were tried, the table has the smallest that fits.",
        "Stale rows are left out.",
        "",
        "| model | recipe | index | chips | smallest slice | peak | of | least s/step "
        "| next smaller |",
        "|---|---|---|---|---|---|---|---|---|",
        *_smallest({name: made for name, made in rows.items() if name not in stale}),
        "",
        "## All rows",
        "",
        "| model | recipe | slice | index | passage tokens | remat | rules | microbatches "
        "| reads | mesh "
        "| fits | peak | of | parameters, optimiser | index | temporaries | start, restart "
        "| least s/step | bound by | MFU | largest index |",
        "|---" * 21 + "|",
    ]
    for row in usual:
        given = [row.model, row.recipe, row.where, row.index]
        given += [str(row.passage_length or "shipped"), row.remat or "shipped"]
        given += [row.rules, str(row.accumulate), row.reading]
        cells = [row.mesh, "not compiled yet", *[""] * 10]
        if row.name in rows:
            cells = _cells(rows[row.name]["plan"])
            cells[1] += ", stale" if row.name in stale else ""
        lines.append("| " + " | ".join((*given, *cells)) + " |")
    lines += _large(rows)
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in found.items()) + "."]
    if stale:
        lines += [
            "",
            "A stale row has another recipe or other versions, or its program was read otherwise.",
        ]
    return "\n".join(lines) + "\n"


def _recipes(rows: dict[str, Any]) -> list[str]:
    """What each recipe that has rows sets, a line each."""
    found: dict[str, str] = {}
    for row in ROW_LIST:
        if row.name in rows and not row.batch:
            plan = rows[row.name]["plan"]
            found[row.recipe] = (
                f"- `{row.recipe}`: {plan['batch_size']} queries a step, each with k = {plan['k']} "
                f"passages; {plan['reader_length']} tokens of question and passage."
            )
    return [found[recipe] for recipe in RECIPES if recipe in found]


def _common_versions(rows: dict[str, Any]) -> dict[str, str]:
    """The versions that most rows were made with."""
    texts = [json.dumps(made["plan"]["versions"]) for made in rows.values()]
    return json.loads(max(texts, key=texts.count)) if texts else {}


def _smallest(rows: dict[str, Any]) -> list[str]:
    """For each model, recipe and index, and each kind of chip, the smallest slice that fits."""
    kinds: dict[tuple[str, str, str, str], list[tuple[Row, dict[str, Any]]]] = {}
    for row in ROW_LIST:
        if row.name in rows and row.passages == PASSAGES:
            kind = (row.model, row.recipe, row.index, row.slice.chip.name)
            kinds.setdefault(kind, []).append((row, rows[row.name]["plan"]))
    lines = []
    for kind, made in sorted(kinds.items(), key=lambda one: _place(one[0])):
        fitting = [(row, plan) for row, plan in made if plan["programs"][0]["fits"]]
        if not fitting:
            row, plan = max(made, key=lambda one: one[0].slice.chips)
            why = f"{row.where}: {_missing(plan['programs'][0])}"
            lines.append("| " + " | ".join((*kind, "larger", "", "", "", why)) + " |")
        else:
            row, plan = min(fitting, key=lambda one: (one[0].slice.chips, _seconds(one[1])))
            train = plan["programs"][0]
            how = [f"{row.accumulate} microbatches"] if row.accumulate > 1 else []
            how += [f"remat {row.remat}"] if row.remat else []
            how += [f"passages of {row.passage_length} tokens"] if row.passage_length else []
            how += [f"mesh/{row.rules}.gin"] if row.rules != "standard" else []
            how += [row.reading] if row.packed or row.fused else []
            cells = [row.where + (f" ({', '.join(how)})" if how else "")]
            cells += [f"{train['peak_bytes_per_chip'] / GIB:.2f}"]
            cells += [f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", _least(train)[0]]
            lines.append("| " + " | ".join((*kind, *cells, _smaller(row.slice, made))) + " |")
    return lines


def _place(kind: tuple[str, str, str, str]) -> tuple[int, bool, int, str]:
    """Where a kind stands: as `RECIPES` has it, bfloat16 first, small models first."""
    model, recipe, index, chip = kind
    size = ("base", "large", "xl", "xxl").index(model)
    return RECIPES.index(recipe), index != "bfloat16", size, chip


def _smaller(fits: Slice, made: list[tuple[Row, dict[str, Any]]]) -> str:
    """What is known of the next smaller slice."""
    below = [chips for chips in fits.chip.shapes if chips < fits.chips]
    if not below:
        return "none"
    name = f"{fits.chip.name}-{max(below) * fits.chip.cores_per_chip}"
    tried = [plan["programs"][0] for row, plan in made if row.slice.chips == max(below)]
    if not tried:
        return f"{name}: not tried"
    return f"{name}: " + _missing(min(tried, key=_peak))


def _is_compiled(train: dict[str, Any]) -> bool:
    """Whether the compiler was asked: else the peak is that of the arguments alone."""
    return "temporaries" in train["bytes_per_chip"]


def _peak(train: dict[str, Any]) -> tuple[bool, int]:
    """For comparison: a peak that is a bound from below comes last."""
    return not _is_compiled(train), train["peak_bytes_per_chip"]


def _missing(train: dict[str, Any]) -> str:
    """Why a program does not fit."""
    needed = f"{train['peak_bytes_per_chip'] / GIB:.2f}"
    if _is_compiled(train):
        return f"no, {needed}"
    return f"no, {needed} by arguments alone"


def _seconds(plan: dict[str, Any]) -> float:
    train = plan["programs"][0]
    return float(train["step_seconds"] + train["step_seconds_without_overlap"])


def _least(train: dict[str, Any]) -> tuple[str, str]:
    """Least seconds and MFU, with and without overlap of products and collectives.

    They have a mark where `plan` warns of the products it counted.
    """
    mark = " ?" if abs(train["compiled_to_counted_flops"] - 1) > DISAGREEMENT else ""
    times = [train[name] for name in _TIMES]
    shares = (train["mfu"], train["mfu_without_overlap"])
    seconds = " to ".join(f"{time:.2f}" for time in times)
    return seconds + mark, " to ".join(f"{share:.0%}" for share in shares) + mark


def _mesh(plan: dict[str, Any]) -> str:
    """The recommended mesh, and what the others that were tried would take."""
    own: str = plan["programs"][0]["mesh"]
    others = []
    for one in plan["tried"]:
        if one["mesh"] != own:
            took = f"{_least(one)[0]} s" if one["fits"] else _missing(one)
            others.append(f"{one['mesh']}: {took}")
    return own + (f" ({'; '.join(others)})" if others else "")


def _large(rows: dict[str, Any]) -> list[str]:
    """The rows of other numbers of passages: each of their programs, and how they start."""
    found = [row for row in ROW_LIST if row.passages != PASSAGES and row.name in rows]
    if not found:
        return []
    lines = ["", "## Larger corpora", "",
             "Peaks are of all that a chip holds while the program runs. `embed` is a batch of a",
             "refresh, and `search` one of an evaluation. Seconds are for one batch.", "",
             "| model | recipe | slice | index | passages | mesh | program | fits | peak | of "
             "| index | least s | bound by |", "|---" * 13 + "|"]  # fmt: skip
    for row in found:
        plan = rows[row.name]["plan"]
        for one in (*plan["programs"], *plan.get("starting", ())):
            terms = one["bytes_per_chip"] | one.get("resident_bytes_per_chip", {})
            held = sum(size for name, size in terms.items() if name.startswith("index"))
            bounds = [one[name] for name in _TIMES if name in one]
            times = " to ".join(f"{seconds:.2g}" for seconds in bounds)
            cells = [row.model, row.recipe, row.where, row.index, f"{row.passages / 1e6:.0f}M"]
            cells += [plan["programs"][0]["mesh"], one["program"]]
            cells += ["yes" if one["fits"] else "no", f"{one['peak_bytes_per_chip'] / GIB:.2f}"]
            cells += [f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", f"{held / GIB:.2f}", times]
            lines.append("| " + " | ".join([*cells, one.get("binding", "")]) + " |")
    return lines


def _cells(plan: dict[str, Any]) -> list[str]:
    train = plan["programs"][0]
    terms = train["bytes_per_chip"]

    def gib(*names: str) -> str:
        return f"{sum(terms.get(name, 0) for name in names) / GIB:.2f}"

    fits = "yes" if train["fits"] else _missing(train)
    cells = [_mesh(plan), fits, f"{train['peak_bytes_per_chip'] / GIB:.2f}"]
    cells += [f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", gib("parameters", "optimiser")]
    cells += [gib("index embeddings", "index tokens")]
    cells += [gib("temporaries") if _is_compiled(train) else ""]
    starting = [one["peak_bytes_per_chip"] / GIB for one in plan.get("starting", ())]
    cells += [", ".join(f"{peak:.2f}" for peak in starting)]
    if "step_seconds" in train:
        seconds, mfu = _least(train)
        cells += [seconds, train["binding"], mfu]
    else:
        cells += ["", "", ""]
    largest = train["largest_index"]
    return [*cells, "" if largest is None else f"{largest / 1e6:.0f}M"]


def _plan(row: Row, seconds: float) -> dict[str, Any] | None:
    """What `atlas-jax plan` writes for this row; None where it ends without a result."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.json"
        command = [
            sys.executable, "-m", "atlas_jax.plan", f"--topology={row.where}",
            f"--passages={row.passages}", *(f"--mesh={mesh}" for mesh in row.meshes),
            f"--programs={','.join(row.programs)}", f"--json={target}",
            *(f"--gin_file={file}" for file in row.files),
            *(f"--gin.{binding}" for binding in row.bindings),
        ]  # fmt: skip
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        try:
            subprocess.run(command, env=env, timeout=seconds, stdout=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return None
        return json.loads(target.read_text()) if target.exists() else None


def _read_rows() -> dict[str, Any]:
    return json.loads(ROWS.read_text()) if ROWS.exists() else {}


def _write(path: Path, text: str) -> None:
    with atomic_text(path) as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
