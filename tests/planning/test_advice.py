"""A program that is too big is told what would make that program smaller."""

import jax
import pytest

from atlas_jax.core.partitioning import MeshConfig
from atlas_jax.planning import advice
from atlas_jax.planning.advice import Case, advise, shared, windowed
from atlas_jax.planning.estimate import Memory, Work
from atlas_jax.planning.roofline import Roofline, roofline
from atlas_jax.planning.run import PROGRAMS
from atlas_jax.training.chips import CHIPS
from tests.planning.small import tiny_run

WHOLE = MeshConfig(8, 1, 1)


@pytest.fixture
def any_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not matter which meshes divide the run, the second that it takes to see it."""
    monkeypatch.setattr(advice, "divides", lambda run, mesh, devices: True)


def changes(
    program: str, term: str, mesh: MeshConfig, *bindings: str, **other: int
) -> tuple[str, str]:
    """What is said to be too big, and the changes in one text."""
    memory = Memory({term: 90, "batch": 20, **other}, 110 + sum(other.values()))
    case = Case(program, tiny_run(*bindings), mesh, jax.devices())
    first, *found = advise(case, memory, 100)
    assert found[-1] == "take a larger slice, or chips with more HBM"
    assert advise(case, memory, memory.peak) == []
    return first, "\n".join(found[:-1])


@pytest.mark.usefixtures("any_mesh")
@pytest.mark.parametrize(
    ("program", "term", "bindings", "said"),
    [
        ("train", "parameters", [], "MeshConfig.fsdp = 8"),
        ("train", "optimiser", [], "adafactor"),
        ("train", "index embeddings", [], "CorpusConfig.dtype = 'bfloat16'"),
        ("search", "index tokens", ["CorpusConfig.dtype=bfloat16"], "CorpusConfig.dtype = 'int8'"),
        ("train", "temporaries", [], "RetrieverConfig.remat_policy = 'full'"),
        ("train", "temporaries", ["BATCH_SIZE=16"], "StepConfig.accumulate = 2: 1 instead of 2"),
        ("train", "temporaries", ["BATCH_SIZE=24"], "StepConfig.accumulate = 3: 1 instead of 3"),
        (
            "embed",
            "temporaries",
            ["CorpusConfig.embed_batch_size=24"],
            "CorpusConfig.embed_batch_size = 16: 2 instead of 3 rows",
        ),
        ("embed", "temporaries", [], "StoreConfig.retriever_length = 16"),
        ("search", "temporaries", ["EvalConfig.batch_size=32"], "EvalConfig.batch_size = 16"),
        ("search", "temporaries", ["StepConfig.rerank=21"], "StepConfig.rerank = 21"),
        ("search", "temporaries", ["StepConfig.rerank=9"], "EvalConfig.recall_at up to 20"),
        ("search", "temporaries", ["EvalConfig.recall_at=(1, 2)"], "EvalConfig.k = 4"),
        ("decode", "temporaries", ["EvalConfig.batch_size=30"], "EvalConfig.batch_size = 16"),
        (
            "decode",
            "temporaries",
            ["GenerationConfig.method='beam'", "GenerationConfig.num_beams=4"],
            "GenerationConfig.num_beams = 2 instead of 4",
        ),
        ("decode", "temporaries", ["GenerationConfig.max_length=7"], "max_length = 7"),
        ("decode", "temporaries", ["EvalConfig.k=2"], "EvalConfig.k = 2"),
    ],
)
def test_what_is_too_big_is_named_with_what_to_change(
    program: str, term: str, bindings: list[str], said: str
) -> None:
    first, found = changes(program, term, WHOLE, *bindings)
    assert first.startswith(("index" if "index" in term else term) + " is the largest term")
    assert said in found


@pytest.mark.usefixtures("any_mesh")
def test_splitting_by_tokens_is_advised_where_it_is_possible_and_not_done() -> None:
    split, bound = MeshConfig(4, 1, 2), "PartitionRules.rules=(('length', 'model'),)"
    assert "mesh/sequence.gin" in changes("train", "temporaries", split)[1]
    assert "mesh/sequence.gin" not in changes("train", "temporaries", split, bound)[1]
    assert "mesh/sequence.gin" not in changes("train", "temporaries", WHOLE)[1]


@pytest.mark.usefixtures("any_mesh")
@pytest.mark.parametrize("program", PROGRAMS["train"][1:])
@pytest.mark.parametrize("term", ["temporaries", "parameters", "batch, padding, results"])
def test_what_only_training_does_is_told_to_training_alone(program: str, term: str) -> None:
    _, found = changes(program, term, WHOLE)
    for word in ("remat_policy", "accumulate", "OptimizerConfig", "num_beams"):  # decoded greedily
        assert word not in found


@pytest.mark.usefixtures("any_mesh")
@pytest.mark.parametrize(
    ("program", "binding"),
    [
        ("train", "StepConfig.accumulate = 2"),  # a batch of 8 on 4 parts, one at a time
        ("embed", "CorpusConfig.embed_batch_size = 4"),
        ("search", "EvalConfig.batch_size = 4"),
        ("decode", "EvalConfig.batch_size = 4"),
    ],
)
def test_a_part_with_one_row_is_split_further(program: str, binding: str) -> None:
    _, found = changes(program, "temporaries", WHOLE)
    assert f"MeshConfig.data = 4, fsdp = 1, model = 2, with {binding}, splits heads" in found
    _, found = changes(program, "temporaries", MeshConfig(2, 4, 1))
    assert f"MeshConfig.data = 1, fsdp = 4, model = 2, with {binding}" in found
    _, found = changes(program, "temporaries", MeshConfig(1, 1, 8), "BATCH_SIZE=1")
    assert "model =" not in found


@pytest.mark.parametrize(
    ("reader", "retriever", "model"),
    [
        (2, 2, None),
        (4, 4, 4),
        (4, 2, None),  # both models have to divide
        (8, 8, 4),
        (6, 6, None),  # four chips do not divide six heads, nor do eight
    ],
)
def test_a_mesh_is_advised_only_if_it_divides_the_run(
    reader: int, retriever: int, model: int | None
) -> None:
    bindings = (f"ReaderConfig.num_heads={reader}", f"RetrieverConfig.num_heads={retriever}")
    width = f"RetrieverConfig.hidden_dim={retriever * 8}"
    one_row = ("BATCH_SIZE=4", "EvalConfig.batch_size=4")
    mesh = MeshConfig(4, 1, 2)
    _, found = changes("decode", "temporaries", mesh, *one_row, *bindings, width)
    assert ("MeshConfig.data = 2, fsdp = 1, model = 4" in found) == (model == 4)
    assert ("MeshConfig" in found) == (model is not None)


def test_the_state_is_spread_only_over_what_divides_it() -> None:
    widths = ("ReaderConfig.emb_dim=20", "RetrieverConfig.hidden_dim=20")  # 4 divides them, not 8
    _, found = changes("train", "parameters", WHOLE, *widths)
    assert "MeshConfig.fsdp = 4, data = 2" in found
    _, found = changes("train", "parameters", MeshConfig(1, 8, 1))
    assert "MeshConfig" not in found


@pytest.mark.usefixtures("any_mesh")
def test_an_optimiser_without_moments_is_not_told_to_have_none() -> None:
    assert "adafactor" in changes("train", "parameters", WHOLE, optimiser=90)[1]
    assert "adafactor" not in changes("train", "parameters", WHOLE, optimiser=3)[1]


@pytest.mark.parametrize(
    ("compute", "memory", "windows", "said"),
    [
        (2.0, 9.0, 6.0, "about 3 instead of 9 s: export LIBTPU_INIT_ARGS=--xla_jf_spmd"),
        (2.0, 9.0, 8.0, "about 2 instead of 9 s"),  # then the products take longest
        (2.0, 9.0, 0.1, ""),
        (9.0, 8.0, 6.0, ""),  # the traffic lies behind the products
        (2.0, 9.0, 0.0, ""),
    ],
)
def test_windowed_products_are_forbidden_where_that_pays(
    compute: float, memory: float, windows: float, said: str
) -> None:
    chip = CHIPS["v5e"]
    flops, moved = compute * chip.bf16_flops, memory * chip.hbm_bandwidth
    work = Work(flops, flops, moved, {}, windowed_bytes=windows * chip.hbm_bandwidth)
    found = windowed(work, roofline(flops, flops, moved, [], chip), chip)
    assert len(found) == bool(said)
    assert said in "".join(found)


@pytest.mark.parametrize(
    ("program", "model", "network", "bindings", "is_said"),
    [
        ("train", 2, 2.0, [], True),
        ("train", 2, 0.5, [], False),
        ("train", 1, 2.0, [], False),
        ("search", 2, 2.0, [], False),
        ("train", 2, 2.0, ["PartitionRules.rules=(('embed', ('fsdp', 'model')),)"], False),
    ],
)
def test_sharing_passages_is_advised_where_split_heads_wait_for_the_network(
    program: str, model: int, network: float, bindings: list[str], is_said: bool
) -> None:
    roof = Roofline({"compute": 1.0, "memory": 0.1, "network": network}, 1e9, 1e9)
    mesh = MeshConfig(8 // model, 1, model)
    found = shared(Case(program, tiny_run(*bindings), mesh, jax.devices()), roof)
    assert ("--gin_file=mesh/passages.gin" in "".join(found)) == is_said
