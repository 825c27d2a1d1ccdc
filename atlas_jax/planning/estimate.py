"""From a compiled program to numbers per chip: memory by term, and work."""

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import jax

from atlas_jax.planning import hlo
from atlas_jax.planning.roofline import Sent, Wiring
from atlas_jax.training.chips import Chip

_REFUSED = re.compile(r"total memory required for [\w ]+ \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one chip in bytes.

    Attributes:
      terms: bytes by name: the program's arguments that stay for the whole run; `temporaries`
        (activations, gradients and buffers) if it was compiled; `resident`, the sum of the
        field below.
      peak: the total by the compiler, with the padding of its layouts.
      resident: arrays that the run holds beside this program's arguments, by name.
    """

    terms: dict[str, int]
    peak: int
    resident: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the program was compiled; if not, the peak is a lower bound."""
        return "temporaries" in self.terms

    def beside(self, resident: dict[str, int]) -> "Memory":
        """The same program in a run that holds these arrays too."""
        more = sum(resident.values())
        if not more:
            return self
        return Memory({**self.terms, "resident": more}, self.peak + more, resident)

    def by_kind(self) -> dict[str, int]:
        """All memory by name, arguments of the program and other arrays together."""
        sizes: dict[str, int] = {}
        own = {name: size for name, size in self.terms.items() if name != "resident"}
        for name, size in [*own.items(), *self.resident.items()]:
            kind = "index" if name.startswith("index") else name
            sizes[kind] = sizes.get(kind, 0) + size
        return sizes


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one run of a program on one chip.

    Attributes:
      flops: of all products, with those that rematerialisation repeats.
      model_flops: of all products, without those that rematerialisation repeats.
      hbm_bytes: read and written.
      collectives: kind -> (runs, bytes that the chip sends).
      compiled_flops: of the products in the compiled program.
      network: what the chip sends, by mesh axes.
      windowed_bytes: of `hbm_bytes`, those of windowed products after their first pass.
    """

    flops: float
    model_flops: float
    hbm_bytes: float
    collectives: dict[str, tuple[int, float]]
    compiled_flops: float = 0.0
    network: tuple[Sent, ...] = ()
    windowed_bytes: float = 0.0

    @property
    def agreement(self) -> float:
        """FLOPs of the compiled program divided by those counted before; about 1."""
        return self.compiled_flops / self.flops if self.flops else 1.0


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of abstract or real arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def resident_memory(terms: dict[str, Any]) -> Memory:
    """Memory of the arrays that stay for the whole run: a lower bound for any program."""
    resident = {name: shard_bytes(tree) for name, tree in terms.items()}
    return Memory(resident, sum(resident.values()))


def compiled_memory(compiled: Any, terms: dict[str, Any]) -> Memory:
    """Memory of a compiled program whose arguments are made up of `terms`.

    The compiler drops arguments that the program does not use. They take memory all the same.
    """
    found = compiled.memory_analysis()
    whole = dict(resident_memory(terms).terms)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    more = found.argument_size_in_bytes + results - sum(whole.values())
    whole["batch, padding, results"] = max(0, more)
    whole["temporaries"] = found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return Memory(whole, sum(whole.values()))


def refused_memory(message: str, terms: dict[str, Any]) -> Memory | None:
    """Memory of a program that the compiler refused, from its message; None for other reasons.

    The message speaks of temporaries, but its figure includes arguments and results: for the sum of
    one large array it gives the size of that array.
    """
    found = _REFUSED.search(message)
    if found is None:
        return None
    resident = resident_memory(terms).terms
    peak = int(float(found[1]) * _UNITS[found[2]])
    resident["temporaries"] = max(0, peak - sum(resident.values()))
    return Memory(resident, peak)


def measure(
    text: str, flops: float, model_flops: float, wiring: Wiring, loop_trips: int = 1
) -> Work:
    """Work per chip from optimised HLO and the FLOPs of the whole machine."""
    program = hlo.Program(text, loop_trips)
    runs: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for one in program.collectives:
        kind = f"{one.kind} between slices" if one.leaves else one.kind
        runs[kind] += one.times
        sent[kind] += one.times * one.wire_bytes
    collectives = {kind: (round(runs[kind]), sent[kind]) for kind in sorted(runs)}
    return Work(
        flops / wiring.devices,
        model_flops / wiring.devices,
        program.hbm_bytes,
        collectives,
        program.product_flops,
        wiring.sent(program.collectives),
        program.windowed_bytes,
    )


def largest_index(memory: Memory, chip: Chip, chips: int, row_bytes: int, batch: int) -> int:
    """Number of passages that fit into the rest of the HBM; 0 if the run does not fit at all.

    Each passage costs its embedding and tokens, and in the search a float32 score per query.
    """
    index = sum(size for name, size in memory.terms.items() if name.startswith("index"))
    free = chip.hbm_bytes - (memory.peak - index)
    per_row = row_bytes + 4 * batch
    # The scores of the present rows are among the temporaries.
    rows_now = index // row_bytes
    return max(0, (free + 4 * batch * rows_now) // per_row * chips)
