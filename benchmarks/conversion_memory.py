"""How much memory a conversion takes: a T5 of a given size, each direction in its own process.

    python -m benchmarks.conversion_memory --folder=somewhere --gigabytes=3

Makes a random T5 1.1 in bfloat16 as a sharded folder of Hugging Face (twice the size is
needed on disk, and is freed again), converts it hf -> atlas-jax -> hf and hf -> t5x ->
atlas-jax, and prints by how much the memory of the process grew over what a tiny conversion
takes. The limit is twice the largest tensor and one shard; exit code 1 where it is passed.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from atlas_jax.interop import huggingface, t5_names
from atlas_jax.interop.safetensors_files import write_sharded
from atlas_jax.interop.tensors import BFLOAT16, Part, Tensor
from atlas_jax.training.conversion import expected_shapes, settle_config

NANO = Path(__file__).parents[1] / "atlas_jax" / "checkpoints" / "nano"
LEGS = (("hf", "atlas-jax"), ("atlas-jax", "hf"), ("hf", "t5x"), ("t5x", "atlas-jax"))
_CHILD = """
import resource, sys
from atlas_jax.training.conversion import Conversion, convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
nano, source, target, input, output, shard = sys.argv[1:]
tokenizers = {"reader": nano + "/reader_tokenizer.json"}
shape = dict(part="reader", max_shard_bytes=int(shard), tokenizers=tokenizers)
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


def make_model(folder: Path, layers: int, width: int, vocab: int, shard_bytes: int) -> Made:
    """Write a random T5 1.1 of `layers` encoder and as many decoder layers, in bfloat16."""
    fields = {
        "vocab_size": vocab, "emb_dim": width, "num_heads": width // 64, "head_dim": 64,
        "mlp_dim": width * 5 // 2, "num_encoder_layers": layers, "num_decoder_layers": layers,
    }  # fmt: skip
    part = Part("reader", dict(fields), {})
    settle_config(part)
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(BFLOAT16)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, BFLOAT16, lambda: np.resize(noise, shape), name, (name,))

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


def measure(made: Made) -> Iterator[Measured]:
    """Convert in every direction; what is not needed any more is removed."""
    places = {"hf": made.folder}
    for source, target in LEGS:
        output = made.folder.parent / f"{source}_to_{target}"
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(NANO), source, target, str(places[source]),
             str(output), str(made.shard)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        grew = int(done.stdout.split("GREW")[1])
        yield Measured(f"{source} -> {target}", grew, time.monotonic() - start)
        shutil.rmtree(f"{output}_tiny")
        if source != "hf":
            shutil.rmtree(places.pop(source))
            shutil.rmtree(output)
        else:
            places[target] = output


def main() -> int:
    """Make, measure, print; 1 where the limit was passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed again")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the model")
    parser.add_argument("--shard_megabytes", type=int, default=500)
    flags = parser.parse_args()
    width, vocab = 2048, 32128
    a_pair = 2 * width * width * (4 + 8 + 2 * 3 * 5 / 2)  # bytes of an encoder and a decoder layer
    layers = max(1, round((flags.gigabytes * 1e9 - 4 * vocab * width) / a_pair))
    shard_bytes = flags.shard_megabytes * 10**6
    made = make_model(flags.folder / "model", layers, width, vocab, shard_bytes)
    limit = 2 * made.largest + made.shard
    print(f"{made.total / 1e9:.2f} GB; largest tensor {made.largest / 1e6:.0f} MB, shard "
          f"{made.shard / 1e6:.0f} MB; limit {limit / 1e6:.0f} MB", flush=True)  # fmt: skip
    worst = 0
    for found in measure(made):
        print(f"{found.leg}: {found.grew / 1e6:.0f} MB, {found.seconds:.0f} s", flush=True)
        worst = max(worst, found.grew)
    shutil.rmtree(flags.folder)
    return int(worst >= limit)


if __name__ == "__main__":
    sys.exit(main())
