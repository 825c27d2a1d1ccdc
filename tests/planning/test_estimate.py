"""Arithmetic of memory and the largest index."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.planning.estimate import (
    Memory,
    compiled_memory,
    largest_index,
    refused_memory,
    shard_bytes,
)
from atlas_jax.training.chips import CHIPS

MESH = Mesh(np.array(jax.devices()), ("all",))


def rows(*shape: int, spread: bool = True) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec("all") if spread else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))


def test_a_spread_array_costs_a_chip_its_share() -> None:
    assert shard_bytes({"a": rows(80, 10), "b": rows(5, spread=False)}) == 80 * 10 * 4 // 8 + 20


def test_the_terms_of_a_compiled_program_add_up_to_its_peak() -> None:
    x, y = rows(8000, 10), rows(10, 10, spread=False)
    compiled = jax.jit(lambda x, y: jnp.sort(x @ y, axis=0)).lower(x, y).compile()
    memory = compiled_memory(compiled, {"parameters": y, "index tokens": x})
    assert memory.terms["parameters"] == 400
    assert memory.terms["index tokens"] == 40_000
    assert sum(memory.terms.values()) == memory.peak
    assert memory.terms["temporaries"] > 40_000  # the sort needs all rows in one place


def test_what_a_program_does_not_use_lies_there_all_the_same() -> None:
    x, unused = rows(8000, 10), rows(4000, 10)
    compiled = jax.jit(lambda x, unused: x.sum()).lower(x, unused).compile()
    memory = compiled_memory(compiled, {"parameters": x, "index tokens": unused})
    assert memory.terms["batch, padding, results"] == 0
    assert memory.peak == 40_000 + 20_000 + memory.terms["temporaries"]


def test_the_compilers_refusal_gives_the_size_of_all_it_needs() -> None:
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
        "memory required for HLO temporaries (270.50G) exceeds available HBM (15.75G)."
    )
    memory = refused_memory(message, {"parameters": rows(80)})
    assert memory is not None
    assert memory.peak == int(270.5 * 2**30)
    assert memory.terms == {"parameters": 40, "temporaries": memory.peak - 40}
    assert refused_memory("INTERNAL: something else", {}) is None


def test_the_largest_index_fills_the_chip() -> None:
    chip, chips, row, batch = CHIPS["v5e"], 4, 3000, 64
    rows_per_chip, rest = 10_000, 2**30

    def memory(rows: int) -> Memory:
        terms = {"index embeddings": row * rows, "temporaries": rest + 4 * batch * rows}
        return Memory(terms, sum(terms.values()))

    found = largest_index(memory(rows_per_chip), chip, chips, row, batch)
    assert found > rows_per_chip * chips
    assert memory(found // chips).peak <= chip.hbm_bytes < memory(found // chips + 1).peak
    crowded = Memory({"index embeddings": row, "temporaries": 2**40}, 2**40 + row)
    assert largest_index(crowded, chip, chips, row, batch) == 0
