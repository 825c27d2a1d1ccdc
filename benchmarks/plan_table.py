"""The table of docs/plan_table.md: `atlas-jax plan` for models, recipes and slices.

    python -m benchmarks.plan_table [--minutes 60] [--row_minutes 30] [--only xxl]

Each row is a process of its own. Rows stand in docs/plan_rows.json as soon as they are done,
with the versions that gave them, and a second call makes only those that are missing or
whose versions differ. What runs out of time is left for the next call.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atlas_jax.core.chips import GIB
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.planning.report import versions

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS, TABLE = DOCS / "plan_rows.json", DOCS / "plan_table.md"
PASSAGES = 37_000_000

# Model, recipe, slice, data,fsdp,model; then, where they are not the shipped ones, the
# rematerialisation policy of both models, or int8, the type of the index (else bfloat16). The
# meshes divide the batch of 64 (mlm_pretrain: 128).
SPECS: tuple[tuple[str, ...], ...] = (
    ("base", "nq_64shot", "v5e-16", "1,16,1"),
    ("base", "nq_64shot", "v5e-16", "1,16,1", "full"),
    ("base", "nq_full", "v5e-16", "1,16,1", "full"),
    ("xxl", "nq_full", "v5e-256", "1,64,4"),
    ("large", "nq_full", "v5e-32", "1,32,1"),
    ("xl", "nq_64shot", "v5e-64", "1,64,1"),
    ("xl", "nq_full", "v5e-64", "1,64,1"),
    ("xl", "mlm_pretrain", "v5e-64", "1,64,1"),
    ("xxl", "nq_64shot", "v5e-256", "1,64,4"),
    ("xxl", "nq_full", "v5e-128", "1,32,4"),
    ("xl", "nq_full", "v4-64", "1,32,1"),
    ("xxl", "nq_full", "v4-128", "1,64,1"),
    ("xxl", "nq_full", "v5p-64", "1,32,1"),
    ("xxl", "nq_full", "v5p-128", "1,64,1"),
    ("xxl", "nq_full", "v6e-64", "1,64,1"),
    ("xxl", "mlm_pretrain", "v5e-256", "1,128,2"),
    ("base", "nq_64shot", "v5e-16", "1,16,1", "full", "int8"),
    ("xxl", "nq_full", "v5e-128", "1,32,4", "int8"),
)
# base is not scanned as shipped, which suits a CPU; on a TPU it would compile for long.
BINDINGS = (
    "CorpusConfig.dtype=bfloat16",
    "ReaderConfig.scan_layers=True",
    "RetrieverConfig.scan_layers=True",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make missing rows until the time is up, then write the table; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after this")
    parser.add_argument("--row_minutes", type=float, default=30, help="give a row up after this")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    flags = parser.parse_args(argv)
    rows, end = _read_rows(), time.monotonic() + 60 * flags.minutes
    for spec in SPECS:
        name = row_name(spec)
        made = rows.get(name)
        if flags.only not in name or (made and made["plan"]["versions"] == versions()):
            continue
        if time.monotonic() > end:
            print(f"{name}: left for the next call")
            continue
        started = time.monotonic()
        plan = _plan(spec, 60 * flags.row_minutes)
        print(f"{name}: {'done' if plan else 'no result'} in {time.monotonic() - started:.0f} s")
        if plan:
            rows[name] = {"bindings": bindings(spec), "plan": plan}
            _write(ROWS, json.dumps(rows, indent=1, sort_keys=True) + "\n")
    _write(TABLE, table(rows))
    return 0


def row_name(spec: Sequence[str]) -> str:
    """What a row is called: all of its specification but the mesh."""
    return "/".join((*spec[:3], *spec[4:]))


def bindings(spec: Sequence[str]) -> list[str]:
    """The gin bindings of a row."""
    names, remat = ("ReaderConfig", "RetrieverConfig"), _remat(spec)
    made = list(BINDINGS)
    if "int8" in spec[4:]:
        made[0] = "CorpusConfig.dtype=int8"
    return [*made, *(f"{name}.remat_policy={remat}" for name in names if remat)]


def _remat(spec: Sequence[str]) -> str:
    """The rematerialisation policy that a row sets, if any."""
    return next((one for one in spec[4:] if one != "int8"), "")


def table(rows: dict[str, Any]) -> str:
    """The rows as a page of Markdown, in the order of `SPECS`, missing ones marked."""
    lines = [
        "# What fits where",
        "",
        "Written by `make plan-table` from `plan_rows.json`; [plan.md](plan.md) says what the",
        f"columns mean. Train step, {PASSAGES:,} passages, embeddings in bfloat16 or, where the",
        "slice says so, int8; GiB per chip.",
        "",
        "| model | recipe | slice | remat | mesh | fits | peak | of | parameters, optimiser "
        "| index | temporaries | least s/step | bound by | MFU | largest index |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for spec in SPECS:
        made, remat = rows.get(row_name(spec)), _remat(spec) or "shipped"
        where = f"{spec[2]}, int8" if "int8" in spec[4:] else spec[2]
        cells = _cells(made["plan"]) if made else [spec[3], "not compiled yet", *[""] * 9]
        lines.append("| " + " | ".join((*spec[:2], where, remat, *cells)) + " |")
    found = next(iter(rows.values()))["plan"]["versions"] if rows else {}
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in found.items()) + "."]
    return "\n".join(lines) + "\n"


def _cells(plan: dict[str, Any]) -> list[str]:
    train = plan["programs"][0]
    terms = train["bytes_per_chip"]

    def gib(*names: str) -> str:
        return f"{sum(terms.get(name, 0) for name in names) / GIB:.2f}"

    fits = "yes" if train["fits"] else "no"
    cells = [train["mesh"], fits, f"{train['peak_bytes_per_chip'] / GIB:.2f}"]
    cells += [f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", gib("parameters", "optimiser")]
    cells += [gib("index embeddings", "index tokens"), gib("temporaries")]
    if "step_seconds" in train:
        cells += [f"{train['step_seconds']:.2f}", train["binding"], f"{train['mfu']:.0%}"]
    else:
        cells += ["", "", ""]
    return [*cells, f"{train['largest_index'] / 1e6:.0f}M"]


def _plan(spec: tuple[str, ...], seconds: float) -> dict[str, Any] | None:
    """What `atlas-jax plan` writes for this row; None where it ends without a result."""
    model, recipe, where, mesh, *_ = spec
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.json"
        command = [
            sys.executable, "-m", "atlas_jax.plan", f"--topology={where}",
            f"--passages={PASSAGES}", f"--mesh={mesh}", "--programs=train", f"--json={target}",
            f"--gin_file=models/{model}.gin", f"--gin_file=runs/{recipe}.gin",
            *(f"--gin.{binding}" for binding in bindings(spec)),
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
