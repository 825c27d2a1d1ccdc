"""How much memory a conversion takes: a T5 of a given size, each direction in its own process.

    python -m benchmarks.conversion_memory --folder=somewhere --model=xl

Makes a random T5 1.1 as a sharded folder of Hugging Face, converts it along a route (by
default one that takes every direction between hf, t5x and atlas-jax once), and prints by how
much the memory of the process grew over what a tiny conversion takes. Each input is removed
when it has been converted, so twice the size of the model is needed on disk. The limit is
twice the largest tensor and one shard; exit code 1 where it is passed.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from atlas_jax import from_gin
from atlas_jax.conversion.convert import expected_shapes, settle_config
from atlas_jax.core.config import load_gin
from atlas_jax.interop import huggingface, t5_names
from atlas_jax.interop.safetensors_files import write_sharded
from atlas_jax.interop.tensors import FLOATS, Part, Tensor
from atlas_jax.reader.config import ReaderConfig

NANO = Path(__file__).parents[1] / "atlas_jax" / "checkpoints" / "nano"
ROUTE = ("hf", "atlas-jax", "t5x", "hf", "t5x", "atlas-jax", "hf")  # each direction once
LEGS = frozenset(itertools.pairwise(ROUTE))
_CHILD = """
import resource, sys
from atlas_jax.reader.config import ReaderConfig
from atlas_jax import from_gin
from atlas_jax.conversion.convert import Conversion, convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
nano, source, target, input, output, shard = sys.argv[1:]
tokenizers = {"reader": nano + "/reader_tokenizer.json"}
shape = dict(
    part="reader", max_shard_bytes=int(shard), tokenizers=tokenizers, allow_spare_rows=True
)
convert(Conversion("atlas-jax", target, (nano,), output + "_tiny", **shape))
before = peak()
convert(Conversion(source, target, (input,), output, **shape), lambda line: None)
print("GREW", peak() - before)
"""


@dataclasses.dataclass(frozen=True)
class Made:
    """A model on disk: its folder, and bytes of all tensors, the largest one and a shard."""

    folder: Path
    total: int
    largest: int
    shard: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One direction: bytes by which memory grew, and seconds."""

    leg: str
    grew: int
    seconds: float


def make_model(
    folder: Path, config: ReaderConfig, shard_bytes: int, dtype: str = "bfloat16"
) -> Made:
    """Write a random T5 as Hugging Face has it, in shards of at most `shard_bytes`."""
    part = Part("reader", dataclasses.asdict(config), {})
    settle_config(part)
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(FLOATS[dtype])

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, FLOATS[dtype], lambda: np.resize(noise, shape), name, (name,))

    names = t5_names.huggingface_names(part.config)
    shapes = expected_shapes(part)
    tensors = {
        theirs: tensor(theirs, shapes[ours][::-1] if turned else shapes[ours])
        for ours, (theirs, turned) in names.items()
    }
    folder.mkdir(parents=True)
    write_sharded(folder, tensors, shard_bytes)
    (folder / "config.json").write_text(json.dumps(huggingface.t5_json(part)))
    sizes = [tensor.nbytes for tensor in tensors.values()]
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Made(folder, sum(sizes), max(sizes), shard)


def measure(made: Made, route: Sequence[str] = ROUTE) -> Iterator[Measured]:
    """Convert from each format of the route to the next; each input is removed afterwards."""
    here = made.folder
    for i, (source, target) in enumerate(itertools.pairwise(route)):
        output = made.folder.parent / f"{i}_{target}"
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(NANO), source, target, str(here), str(output),
             str(made.shard)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        grew = int(done.stdout.split("GREW")[1])
        yield Measured(f"{source} -> {target}", grew, time.monotonic() - start)
        shutil.rmtree(f"{output}_tiny")
        shutil.rmtree(here)
        here = output


def _route(text: str) -> tuple[str, ...]:
    route = tuple(text.split(","))
    if len(route) < 2 or route[0] != "hf" or not set(itertools.pairwise(route)) <= LEGS:
        raise argparse.ArgumentTypeError(f"{text}: expected two or more of {', '.join(ROUTE[:3])}, "
                                         "hf first, none twice in a row")  # fmt: skip
    return route


def main() -> int:
    """Make, measure, print; 1 where the limit was passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed again")
    parser.add_argument("--model", default="xl", help="of gin/models")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shard_megabytes", type=int, default=500)
    parser.add_argument("--route", type=_route, default=ROUTE, help="formats, from hf; commas")
    flags = parser.parse_args()
    load_gin([f"models/{flags.model}.gin"])
    shard_bytes = flags.shard_megabytes * 10**6
    made = make_model(flags.folder / "model", from_gin.told(ReaderConfig), shard_bytes, flags.dtype)
    limit = 2 * made.largest + made.shard
    print(f"{made.total / 1e9:.2f} GB; largest tensor {made.largest / 1e6:.0f} MB, shard "
          f"{made.shard / 1e6:.0f} MB; limit {limit / 1e6:.0f} MB", flush=True)  # fmt: skip
    worst = 0
    for found in measure(made, flags.route):
        print(f"{found.leg}: {found.grew / 1e6:.0f} MB, {found.seconds:.0f} s", flush=True)
        worst = max(worst, found.grew)
    shutil.rmtree(flags.folder)
    return int(worst >= limit)


if __name__ == "__main__":
    sys.exit(main())
