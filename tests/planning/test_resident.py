"""What a run holds on the chips counts in each of its programs, once."""

import dataclasses
import math

import jax
import pytest
from rich.console import Console

from atlas_jax import from_gin
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, make_mesh
from atlas_jax.plan import UNREAD
from atlas_jax.planning.estimate import shard_bytes
from atlas_jax.planning.planner import Plan, make_plan, plan_program
from atlas_jax.planning.programs import held, make_program, resident
from atlas_jax.planning.report import as_json, show
from atlas_jax.planning.run import Run
from atlas_jax.training.chips import Slice
from tests.planning.small import SLICE, TINY, tiny_run

MESH = MeshConfig(2, 2, 2)
REFRESHED = ["RETRIEVER_TRAINING='joint'", "REFRESH='0-100:10'"]
INDEX = {"index embeddings", "index tokens"}
EVALUATION = [
    "INITIAL_CHECKPOINT_PATH=x", "STORE=x", "EVAL_FILE=x", "K=4", "TEXT_LENGTH=24",
    "PASSAGE_LENGTH=16", "BATCH_SIZE=8", "DataConfig.query_length=8", "DataConfig.target_length=4",
    "DataConfig.retriever_query_length=8", "CorpusConfig.embed_batch_size=8",
]  # fmt: skip
BUILDING = [
    "INITIAL_CHECKPOINT_PATH=x", "PASSAGES=x", "STORE=x", "INDEX=x", "PASSAGE_LENGTH=16",
    "EMBED_BATCH_SIZE=8",
]  # fmt: skip


def run_of(entry: str, *more: str) -> Run:
    bindings = {"evaluate": EVALUATION, "build_index": BUILDING}[entry]
    load_gin([f"runs/{entry}.gin"], [*TINY, *bindings, *more])
    return from_gin.plan_run(5000)


def sizes(run: Run, program: str) -> tuple[dict[str, int], dict[str, int]]:
    """Of the program's lasting arguments, and of what lies beside them, on a chip."""
    mesh = make_mesh(MESH)
    made = make_program(program, run, mesh)
    own = {term: shard_bytes(tree) for term, tree in made.terms.items()}
    return own, resident(made, run, mesh)


def shown(plan: Plan) -> str:
    console = Console(record=True, width=200)
    show(plan, console)
    return console.export_text()


@pytest.mark.parametrize("bindings", [REFRESHED, ["StepConfig.rerank=9", *REFRESHED], []])
def test_each_program_of_a_training_run_is_beside_all_that_the_step_has(
    bindings: list[str],
) -> None:
    run = tiny_run(*bindings)
    whole, beside = sizes(run, "train")
    assert beside == {} and set(whole) == {"parameters", "optimiser", *INDEX}
    for program in ("search", "decode"):
        own, beside = sizes(run, program)
        assert {term: own.get(term, 0) + beside.get(term, 0) for term in whole} == whole
        assert beside["optimiser"] == whole["optimiser"]
    own, beside = sizes(run, "embed")
    # Without a refresh passages are embedded once, before the index is put there.
    expected = {term: size for term, size in whole.items() if bindings or term not in INDEX}
    assert {term: own.get(term, 0) + beside.get(term, 0) for term in expected} == expected
    assert INDEX.isdisjoint(beside) == (not bindings)


def test_what_is_answered_or_built_without_training_has_no_optimiser() -> None:
    run = run_of("evaluate")
    assert run.programs == ("decode", "embed", "search")
    mesh = make_mesh(MESH)
    everything = {term: shard_bytes(tree) for term, tree in held(run, mesh).items()}
    assert set(everything) == {"parameters", *INDEX}
    for program in ("decode", "search"):
        own, beside = sizes(run, program)
        assert {t: own.get(t, 0) + beside.get(t, 0) for t in everything} == everything
    assert set(sizes(run, "embed")[1]) == {"parameters"}  # the reader
    # The retriever's tokens lie there only where passages are ranked anew.
    tokens = everything["index tokens"]
    mesh_terms = held(run_of("evaluate", "StepConfig.rerank=9"), mesh)
    assert shard_bytes(mesh_terms["index tokens"]) == 2 * tokens
    closed = run_of("evaluate", "PASSAGE_SOURCE='none'")
    assert closed.programs == ("decode",) and set(held(closed, mesh)) == {"parameters"}


@pytest.mark.parametrize("bindings", ["PASSAGE_SOURCE='file'", "CorpusConfig.searcher='scann'"])
def test_an_evaluation_that_does_not_search_on_the_chips_holds_models_alone(bindings: str) -> None:
    run = run_of("evaluate", bindings)
    assert "search" not in run.programs
    assert set(held(run, make_mesh(MESH))) == {"parameters"}
    found = make_plan(run, SLICE, jax.devices(), programs=["decode"])
    assert found.recommended is not None
    assert "index embeddings" not in found.programs[0].memory.terms


@pytest.mark.parametrize(
    ("run", "command"),
    [("contriever_pretrain", "train_retriever"), ("retriever_finetune", "train_retriever"),
     ("classify", "train_classifier"), ("list_30shot", "self_train"),
     ("list_claims", "self_train"), ("pet", "pet"), ("retrieve", "retrieve")],
)  # fmt: skip
def test_commands_without_a_plan_are_named(run: str, command: str) -> None:
    files = dict.fromkeys(("EVAL_FILE", "OUTPUT", "ENCODER", "UNLABELLED_FILE"), "x")
    load_gin([f"runs/{run}.gin"], TINY, unread=UNREAD | files)
    with pytest.raises(UserError, match=f"run of `{command}`, which has no plan"):
        from_gin.plan_run(5000)


def test_an_index_is_built_with_the_whole_retriever_on_each_chip() -> None:
    run = run_of("build_index")
    assert run.programs == ("embed",)
    own, beside = sizes(run, "embed")
    params = jax.tree.leaves(make_program("embed", run, make_mesh(MESH)).terms["parameters"])
    assert own == {"parameters": 4 * sum(math.prod(leaf.shape) for leaf in params)}
    assert beside == {}
    found = make_plan(run, SLICE, jax.devices())
    assert [one.program for one in found.programs] == ["embed"] and found.recommended
    assert "embed on mesh" in shown(found)


def with_hbm(size: int) -> Slice:
    """The slice with chips of this much HBM."""
    return dataclasses.replace(SLICE, chip=dataclasses.replace(SLICE.chip, hbm_bytes=size))


def test_a_program_fits_only_with_what_lies_beside_it() -> None:
    run = tiny_run(*REFRESHED)
    given = ("decode", run, MESH)
    one = plan_program(*given, SLICE, jax.devices())
    beside = sum(one.memory.resident.values())
    assert one.fits and one.memory.terms["resident"] == beside > 0
    assert one.memory.peak == sum(one.memory.terms.values())
    tight = with_hbm(one.memory.peak)
    assert plan_program(*given, tight, jax.devices()).fits
    tight = with_hbm(one.memory.peak - 1)
    found = plan_program(*given, tight, jax.devices())
    assert not found.fits and found.memory.peak == one.memory.peak
    # The index is no argument of it and the largest of what lies there.
    assert found.advice[0].startswith("index is the largest term")
    assert "of what else the run holds" in found.advice[0]
    assert "CorpusConfig.dtype = 'bfloat16'" in found.advice[1]
    # Arguments and what lies beside them are too much already: it is not compiled.
    lasting = one.memory.terms["parameters"] + beside
    none = with_hbm(lasting - 1)
    found = plan_program(*given, none, jax.devices())
    assert (found.fits, found.memory.is_whole, found.memory.peak) == (False, False, lasting)


def test_the_resident_term_stands_in_table_and_json() -> None:
    found = make_plan(tiny_run(*REFRESHED), SLICE, jax.devices(), [MESH], programs=["decode"])
    train, decode = as_json(found)["programs"]
    assert "resident" not in train["bytes_per_chip"] and train["resident_bytes_per_chip"] == {}
    beside = decode["resident_bytes_per_chip"]
    assert set(beside) == {"parameters", "optimiser", *INDEX}
    assert decode["bytes_per_chip"]["resident"] == sum(beside.values())
    assert "resident" in shown(found)


def test_a_batch_that_a_run_would_refuse_is_named_once() -> None:
    sizes_of = ("EvalConfig.batch_size=6", "CorpusConfig.embed_batch_size=6")
    run = tiny_run("EvalConfig.file='x'", *sizes_of)
    found = make_plan(run, SLICE, jax.devices(), [MESH])
    embed, search, decode = found.programs[1:]
    assert embed.warning != "" and search.warning == decode.warning == ""  # these are filled up
    text = shown(found)
    assert text.count("CorpusConfig.embed_batch_size = 6 does not divide over the 4 parts") == 1
    assert "use a multiple of 4; planned with 8" in text
    assert "EvalConfig.batch_size" not in text


def test_an_evaluations_mesh_divides_its_batch() -> None:
    run = run_of("evaluate", "BATCH_SIZE=4")
    found = make_plan(run, SLICE, jax.devices(), programs=["decode"])
    assert found.recommended is not None and found.possible > 0
    assert found.recommended.data * found.recommended.fsdp == 4
    assert found.programs[0].warning == ""


def test_it_says_how_many_meshes_of_how_many_were_tried() -> None:
    run = run_of("build_index")
    some = make_plan(run, SLICE, jax.devices(), try_meshes=1)
    every = some.possible
    assert f"of the 1 tried; the run divides over {every} (--try_meshes={every} takes all)" in (
        shown(some)
    )
    assert as_json(some)["possible_meshes"] == every > 1
    assert f"of all {every} that the run" in shown(make_plan(run, SLICE, jax.devices(), (), every))
    assert "divides over" not in shown(make_plan(run, SLICE, jax.devices(), [MESH]))
