"""Entry point `python -m atlas_jax.plan`: would a run fit on a TPU slice, and how fast at best?

    python -m atlas_jax.plan --topology=v5e-256 --passages=37000000 \\
      --gin_file=models/xxl.gin --gin_file=runs/nq_full.gin --gin.CorpusConfig.dtype=bfloat16

Compiles the run's own programs ahead of time with the TPU compiler (extra [plan]); no TPU is
needed and nothing is read: paths need not be given. Without --mesh it tries some meshes and
recommends one. With --gin.MeshConfig.dcn=2 it plans two such slices. A run of pretrain_encoder has
no --passages.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.core.paths import check_output_file
from atlas_jax.planning.planner import make_plan, tpu_devices
from atlas_jax.planning.report import show, write_json
from atlas_jax.planning.run import PROGRAMS
from atlas_jax.planning.starting import START
from atlas_jax.training.chips import parse_slice

NOT_FITTING = 3
# What runs require and a plan does not look at.
UNREAD = {
    name: "(not read)"
    for name in (
        "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "READER_CHECKPOINT_PATH",
        "RETRIEVER_CHECKPOINT_PATH", "READER_TOKENIZER", "RETRIEVER_TOKENIZER", "TRAIN_FILE",
        "STORE", "PASSAGES", "INDEX", "TOKENIZER",
    )
} | {"TRAIN_STEPS": 10**6}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 0 if the run fits, 3 if not or if it would stop, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", required=True, help="v4-128, v5e-256, v5p-64, v6e-32 ...")
    parser.add_argument(
        "--passages", type=int, help="rows of the index; not for pretrain_encoder, which has none"
    )
    parser.add_argument(
        "--mesh", action="append", default=[], metavar="D,F,M",
        help="data,fsdp,model sizes, and expert if there is a fourth; repeatable; without it the "
        "likeliest ones are tried",
    )  # fmt: skip
    parser.add_argument("--try_meshes", type=int, default=3, help="how many (default: 3)")
    parser.add_argument(
        "--programs",
        default="",
        help=f"of {','.join((*PROGRAMS['train'], START))} (default: the run's own)",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the plan there, too")
    return launch(_run, parser, argv, unread=UNREAD)


def _run(flags: argparse.Namespace) -> int:
    if flags.json:
        check_output_file(flags.json, "--json")
    where = parse_slice(flags.topology)
    for name in ("passages", "try_meshes"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} = {getattr(flags, name)}: expected 1 or more")
    shape = from_gin.told(MeshConfig)
    if shape.dcn < 1:
        raise UserError(f"MeshConfig.dcn = {shape.dcn}: expected the number of slices, 1 or more")
    meshes = [_mesh(text, shape) for text in flags.mesh]
    run = from_gin.plan_run(flags.passages)
    programs = flags.programs.split(",") if flags.programs else []
    known = (*PROGRAMS[run.entry], *((START,) if run.entry == "train" else ()))
    unknown = sorted(set(programs) - set(known))
    if unknown:
        raise UserError(
            f"--programs: no program of this run ({run.entry}) is called {unknown[0]}; "
            f"of {', '.join(known)}"
        )
    progress = Console(stderr=True)
    devices = tpu_devices(where, shape.dcn)
    plan = make_plan(
        run, where, devices, meshes, flags.try_meshes, programs, progress.print, shape.dcn
    )
    show(plan, Console())
    if flags.json:
        write_json(plan, flags.json)
    return 0 if plan.goes else NOT_FITTING


def _mesh(text: str, shape: MeshConfig) -> MeshConfig:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    axes = {3: ("data", "fsdp", "model"), 4: ("data", "fsdp", "model", "expert")}.get(len(sizes))
    if axes is None:
        raise UserError(
            f"--mesh={text}: expected three numbers, data,fsdp,model, as 1,64,4; a fourth is expert"
        )
    return dataclasses.replace(shape, **dict(zip(axes, sizes, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
