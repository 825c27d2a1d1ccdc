"""Advice for a program that does not fit: changes that the run allows, with their bindings."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.planning.estimate import Memory, Work
from atlas_jax.planning.meshes import MAX_MODEL, divides, divisors
from atlas_jax.planning.roofline import Roofline
from atlas_jax.planning.run import Pretraining
from atlas_jax.training.chips import GIB, Chip


@dataclasses.dataclass(frozen=True)
class Case:
    """A program that was compiled.

    Attributes:
      program: a name in `run.PROGRAMS`.
      devices: all devices of all slices; the mesh uses all of them.
    """

    program: str
    run: Any
    mesh: MeshConfig
    devices: Any

    @property
    def chips(self) -> int:
        """Number of chips in one slice."""
        return len(self.devices) // self.mesh.dcn

    @property
    def parts(self) -> int:
        """Number of parts of the mesh that have their own rows of a batch."""
        return batch_split(self.mesh)


def batch_split(mesh: MeshConfig) -> int:
    """Number of parts into which a mesh splits a batch."""
    return mesh.dcn * mesh.data * mesh.fsdp * mesh.expert


def advise(case: Case, memory: Memory, hbm_bytes: int) -> list[str]:
    """For a program that is too large: its largest term, then possible changes."""
    if memory.peak <= hbm_bytes:
        return []
    sizes = memory.by_kind()
    largest = max(sizes, key=lambda name: sizes[name])
    needed = "needed" if memory.is_whole else "needed by its arguments alone"
    if memory.resident:
        needed += f", with {memory.terms['resident'] / GIB:.2f} of what else the run holds"
    too_big = (
        f"{largest} is the largest term, {sizes[largest] / GIB:.2f} of {memory.peak / GIB:.2f} GiB "
        f"{needed}; a program may use {hbm_bytes / GIB:.2f}"
    )
    if largest in ("parameters", "optimiser"):
        changes = _state_advice(case, sizes)
    elif largest == "index":
        changes = _index_advice(case)
    else:
        changes = _TEMPORARIES[case.program](case)
    return [too_big, *changes, "take a larger slice, or chips with more HBM"]


# Of the bound with overlap; below it, the second compilation is worth more than what is won.
_PAYS = 0.02
_NO_WINDOWS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


def windowed(work: Work, roof: Roofline, chip: Chip) -> list[str]:
    """The flag that forbids windowed products, if the time of their passes shows."""
    memory = (work.hbm_bytes - work.windowed_bytes) / chip.hbm_bandwidth
    without = Roofline(roof.seconds | {"memory": memory}, roof.model_flops, roof.peak_flops)
    if without.step_seconds > (1 - _PAYS) * roof.step_seconds:
        return []
    return [
        f"{work.windowed_bytes / GIB:,.0f} GiB of the HBM traffic are of products that wait for "
        "their weights, shard by shard, after the first shard. Without them the least time is "
        f"about {without.step_seconds:.3g} instead of {roof.step_seconds:.3g} s: export "
        f"LIBTPU_INIT_ARGS={_NO_WINDOWS}, for the plan and the run"
    ]


def shared(case: Case, roof: Roofline) -> list[str]:
    """The mesh whose chips share passages, where a split of heads waits for the network."""
    split = case.program == "train" and case.mesh.model > 1 and "heads" in dict(case.run.rules)
    if not split or roof.binding != "network":
        return []
    return [
        f"the network takes longest, with heads split over model = {case.mesh.model}: try "
        "--gin_file=mesh/passages.gin, where these chips share the passages of a query"
    ]


def _state_advice(case: Case, sizes: dict[str, int]) -> list[str]:
    found, model = [], case.mesh.model
    groups = case.chips // model // case.mesh.expert
    for fsdp in reversed([size for size in divisors(groups) if size > case.mesh.fsdp]):
        wider = MeshConfig(groups // fsdp, fsdp, model, case.mesh.dcn, case.mesh.expert)
        if divides(case.run, wider, case.devices):
            found.append(
                f"spread the state further: MeshConfig.fsdp = {fsdp}, data = {groups // fsdp}"
            )
            break
    # An optimiser that is smaller than its parameters has hardly any moments already.
    if sizes.get("optimiser", 0) >= sizes.get("parameters", 0):
        scope = "encoder" if isinstance(case.run, Pretraining) else "reader"
        found.append(f"{scope}/OptimizerConfig.kind = 'adafactor' keeps hardly any moments")
    return found


def _index_advice(case: Case) -> list[str]:
    run, found = case.run, []
    width = run.models.retriever.config.embedding_dim
    per_chip = run.passages * width // case.chips / GIB
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


def _train_advice(case: Case) -> list[str]:
    run, found = case.run, list[str]()
    reader, retriever = run.models.reader.config, run.models.retriever.config
    for name, config in (("ReaderConfig", reader), ("RetrieverConfig", retriever)):
        if config.remat_policy != "full":
            found.append(f"{name}.remat_policy = 'full' keeps one activation a layer")
    if case.mesh.model > 1 and "length" not in dict(run.rules):
        found.append("--gin_file=mesh/sequence.gin splits by tokens what is kept between layers")
    batch, accumulate = run.data.batch_size, run.step.accumulate
    rows = batch // accumulate // case.parts
    narrower = _split_further(case)
    if rows > 1:
        times = divisors(rows)[1]  # numbers of microbatches that divide over the mesh
        found.append(
            f"StepConfig.accumulate = {times * accumulate}: {rows // times} instead of {rows} "
            f"queries of {run.step.k} passages at once on each part of the mesh"
        )
    elif narrower:
        found.append(
            f"{_binding(narrower)}, with StepConfig.accumulate = "
            f"{batch // batch_split(narrower)}, splits heads and MLPs further: each "
            "part of the mesh has one query already"
        )
    found += _narrow("ReaderConfig", reader)
    found.append(
        f"fewer passages (StepConfig.k = {run.step.k}) or shorter inputs "
        f"(StepConfig.reader_length = {run.step.reader_length})"
    )
    return found


def _pretrain_advice(case: Case) -> list[str]:
    run, found = case.run, list[str]()
    name = "EncoderModelConfig"
    if run.encoder.remat_policy != "full":
        found.append(f"{name}.remat_policy = 'full' keeps one activation a layer")
    found += [*_smaller_batch(case), *_narrow(name, run.encoder)]
    length = run.pretraining.train.length
    return [*found, f"shorter rows (EncoderTrainConfig.length = {length})"]


def _embed_advice(case: Case) -> list[str]:
    run = case.run
    return [
        *_smaller_batch(case),
        *_narrow("RetrieverConfig", run.models.retriever.config),
        f"shorter passages (StoreConfig.retriever_length = {run.store.retriever_length})",
    ]


def _search_advice(case: Case) -> list[str]:
    run = case.run
    depth = f"EvalConfig.k = {run.answer_k}"
    if run.step.rerank > run.answer_depth:
        depth = f"StepConfig.rerank = {run.step.rerank}"
    elif run.answer_depth > run.answer_k:
        depth = f"EvalConfig.recall_at up to {run.answer_depth}"
    return [
        *_smaller_batch(case),
        f"fewer passages a query ({depth})",
        "CorpusConfig.searcher = 'scann' searches on the hosts",
    ]


def _decode_advice(case: Case) -> list[str]:
    run, generation = case.run, case.run.generation
    found = _smaller_batch(case)
    if generation.method == "beam" and generation.num_beams > 1:
        found.append(
            f"GenerationConfig.num_beams = {generation.num_beams // 2} instead of "
            f"{generation.num_beams}: each beam has its own cache and logits"
        )
    found += _narrow("ReaderConfig", run.models.reader.config)
    found.append(
        f"shorter answers (GenerationConfig.max_length = {generation.max_length}), fewer passages "
        f"(EvalConfig.k = {run.answer_k}) or shorter inputs "
        f"(StepConfig.reader_length = {run.step.reader_length})"
    )
    return found


# For what is in use while a program runs.
_TEMPORARIES: dict[str, Callable[[Case], list[str]]] = {
    "train": _train_advice,
    "embed": _embed_advice,
    "search": _search_advice,
    "decode": _decode_advice,
    "pretrain": _pretrain_advice,
}


def _smaller_batch(case: Case) -> list[str]:
    """Fewer rows on each part of the mesh; if each has only one, fewer parts."""
    binding, rows = case.run.batch_of(case.program)
    each = -(-rows // case.parts)
    if each > 1:
        less = -(-each // 2)
        return [
            f"{binding} = {less * case.parts}: {less} instead of {each} rows at once on each part "
            "of the mesh"
        ]
    narrower = _split_further(case)
    if narrower is None:
        return []
    return [
        f"{_binding(narrower)}, with {binding} = {batch_split(narrower)}, splits heads and "
        "MLPs further: each part of the mesh has one row already"
    ]


def _split_further(case: Case) -> MeshConfig | None:
    """The mesh with the next larger `model` over which the run divides."""
    chips = case.chips // case.mesh.expert
    for model in divisors(chips):
        if case.mesh.model < model <= MAX_MODEL:
            fsdp = math.gcd(case.mesh.fsdp, chips // model)
            found = dataclasses.replace(
                case.mesh, data=chips // model // fsdp, fsdp=fsdp, model=model
            )
            if divides(case.run, found, case.devices):
                return found
    return None


def _binding(mesh: MeshConfig) -> str:
    return f"MeshConfig.data = {mesh.data}, fsdp = {mesh.fsdp}, model = {mesh.model}"


def _narrow(name: str, config: Any) -> list[str]:
    if config.dtype != "float32":
        return []
    return [f"{name}.dtype = 'bfloat16' halves the activations"]
