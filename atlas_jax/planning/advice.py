"""What to change when a program does not fit."""

import jax.numpy as jnp

from atlas_jax.core.chips import GIB
from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.planning.estimate import Memory
from atlas_jax.planning.programs import Run


def advise(memory: Memory, hbm_bytes: int, run: Run, mesh: MeshConfig, chips: int) -> list[str]:
    """For a program that is too big: the largest term, then changes with their bindings."""
    if memory.peak <= hbm_bytes:
        return []
    names = {"index embeddings": "index", "index tokens": "index"}
    sizes: dict[str, int] = {}
    for term, size in memory.terms.items():
        name = names.get(term, term)
        sizes[name] = sizes.get(name, 0) + size
    largest = max(sizes, key=lambda name: sizes[name])
    too_big = (
        f"{largest} is the largest term, {sizes[largest] / GIB:.2f} of {memory.peak / GIB:.2f} GiB "
        f"needed; a program may use {hbm_bytes / GIB:.2f}"
    )
    advice = {
        "parameters": _state_advice,
        "optimiser": _state_advice,
        "index": _index_advice,
    }.get(largest, _temporaries_advice)
    return [too_big, *advice(run, mesh, chips), "take a larger slice, or chips with more HBM"]


def _state_advice(run: Run, mesh: MeshConfig, chips: int) -> list[str]:
    found = []
    if mesh.fsdp * mesh.model < chips:
        found.append(f"spread the state further: MeshConfig.fsdp = {chips // mesh.model}, data = 1")
    found.append("reader/OptimizerConfig.kind = 'adafactor' keeps hardly any moments")
    return found


def _index_advice(run: Run, mesh: MeshConfig, chips: int) -> list[str]:
    found = []
    width = run.models.retriever.config.embedding_dim
    per_chip = run.passages * width // chips / GIB
    for dtype, rows in (("bfloat16", ("float32",)), ("int8", ("float32", "bfloat16"))):
        if run.corpus.dtype in rows and run.corpus.searcher == "exact":
            saved = jnp.dtype(run.corpus.dtype).itemsize - jnp.dtype(dtype).itemsize
            found.append(f"CorpusConfig.dtype = {dtype!r} saves {saved * per_chip:.2f} GiB a chip")
    store = run.store
    longest = max(store.reader_length, store.retriever_length)
    if longest > 256:
        found.append(
            f"StoreConfig.reader_length = {store.reader_length}, retriever_length = "
            f"{store.retriever_length}: passages of 100 words need about 200 tokens"
        )
    found.append("CorpusConfig.searcher = 'scann' keeps the index on the hosts")
    return found


def _temporaries_advice(run: Run, mesh: MeshConfig, chips: int) -> list[str]:
    found = []
    reader, retriever = run.models.reader.config, run.models.retriever.config
    for name, config in (("ReaderConfig", reader), ("RetrieverConfig", retriever)):
        if config.remat_policy != "full":
            found.append(f"{name}.remat_policy = 'full' keeps one activation a layer")
    rows = run.data.batch_size // run.step.accumulate // (mesh.data * mesh.fsdp)
    if rows > 1:
        found.append(
            f"StepConfig.accumulate = {2 * run.step.accumulate} halves the rows at once "
            f"({rows} queries of {run.step.k} passages on each part of the mesh)"
        )
    else:
        found.append(
            f"MeshConfig.model = {2 * mesh.model} splits heads and MLPs further: each part of "
            "the mesh has one query already"
        )
    if reader.dtype == "float32":
        found.append("ReaderConfig.dtype = 'bfloat16' halves the activations")
    found.append(f"fewer passages (StepConfig.k = {run.step.k}) or shorter inputs "
                 f"(StepConfig.reader_length = {run.step.reader_length})")  # fmt: skip
    return found
