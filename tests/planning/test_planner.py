"""A whole plan on eight simulated devices; with libtpu on a slice that is not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from atlas_jax import from_gin
from atlas_jax import plan as entry_point
from atlas_jax.core import memory
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.partitioning import MeshConfig, activate, make_mesh
from atlas_jax.planning import compiled as compiled_programs
from atlas_jax.planning import planner
from atlas_jax.planning.advice import Case, advise
from atlas_jax.planning.estimate import Memory, Work, shard_bytes
from atlas_jax.planning.meshes import candidates
from atlas_jax.planning.planner import Plan, ProgramPlan, make_plan
from atlas_jax.planning.programs import make_program
from atlas_jax.planning.report import as_json, show, write_json
from atlas_jax.planning.roofline import Roofline
from atlas_jax.planning.run import LANES, PROGRAMS, Run
from atlas_jax.training.chips import CHIPS, Slice, parse_slice
from tests.planning.small import RECIPE, SLICE, TINY, tiny_run

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]"
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    run = tiny_run("RETRIEVER_TRAINING='joint'")
    return make_plan(run, SLICE, jax.devices(), [MeshConfig(2, 2, 2)])


def test_a_plan_has_all_four_programs_with_their_terms(plan: Plan) -> None:
    train, embed, search, decode = plan.programs
    assert [one.program for one in plan.programs] == ["train", "embed", "search", "decode"]
    assert all(one.fits and one.roof and one.roof.step_seconds > 0 for one in plan.programs)
    rows = 5 * 1024  # padded to a multiple of 128 rows a device
    assert train.memory.terms["index embeddings"] == rows // 8 * 16 * 4
    assert train.memory.terms["index tokens"] == rows // 8 * 2 * LANES * 2  # of 16 tokens
    # AdamW: two moments as large as the parameters, and the schedules' counts.
    parameters, optimiser = train.memory.terms["parameters"], train.memory.terms["optimiser"]
    assert 2 * parameters <= optimiser < 2 * parameters + 100
    assert train.largest_index > 10**6
    assert decode.largest_index is None
    assert embed.memory.terms["parameters"] < search.memory.peak < train.memory.peak


def test_the_start_holds_the_given_parameters_beside_the_state(plan: Plan) -> None:
    train, (start, restart) = plan.programs[0], plan.starting
    parameters, optimiser = (train.memory.terms[name] for name in ("parameters", "optimiser"))
    rest = restart.memory.terms["step and key"]
    assert restart.memory.peak == parameters + optimiser + rest and 0 < rest < 50
    assert start.memory.terms["parameters"] == parameters
    state = start.memory.terms["batch, padding, results"]
    assert restart.memory.peak <= state < 1.1 * restart.memory.peak  # and its table of arrays
    assert [one["program"] for one in as_json(plan)["starting"]] == ["start", "restart"]
    assert plan.goes
    full = dataclasses.replace(start, fits=False)
    assert not dataclasses.replace(plan, starting=[full, restart]).goes


def test_a_run_larger_than_this_machines_memory_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    program = make_program("train", tiny_run(), make_mesh(MeshConfig(2, 2, 2)))
    assert shard_bytes(program.terms["parameters"]) > 1000


@pytest.mark.parametrize("name", ["train", "decode"])
def test_packed_passages_count_as_the_rows_that_they_share(name: str) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))

    def flops(rows: int) -> float:
        run = tiny_run(f"StepConfig.packed_rows={rows}")
        return compiled_programs.count_flops(make_program(name, run, mesh), run, mesh)[0]

    padded = flops(0)
    assert flops(-1) == flops(4) == padded  # no corpus is read; as many rows as passages
    assert 0.5 * padded < flops(2) < 0.9 * padded


def test_packed_passages_of_the_tower_count_as_the_rows_that_they_share() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))

    def flops(rows: int) -> float:
        run = tiny_run(f"StepConfig.packed_passages={rows}", "RETRIEVER_TRAINING='joint'")
        return compiled_programs.count_flops(make_program("train", run, mesh), run, mesh)[0]

    assert flops(-1) == flops(4) == flops(0)
    assert 0.8 * flops(0) < flops(2) < 0.95 * flops(0)


def test_an_int8_index_counts_its_scales() -> None:
    run = tiny_run("CorpusConfig.dtype=int8")
    terms = make_program("search", run, make_mesh(MeshConfig(2, 2, 2))).terms
    assert shard_bytes(terms["index embeddings"]) == 5 * 1024 // 8 * (16 + 4)
    assert run.row_bytes == 16 + 4 + LANES * 2


@pytest.mark.parametrize(
    ("bindings", "holds"),
    [
        (["RETRIEVER_TRAINING='joint'"], True),
        (["RETRIEVER_TRAINING='query_side'"], False),
        (["RETRIEVER_TRAINING='fixed'"], False),
        (["CorpusConfig.dtype=int8", "StepConfig.rerank=9"], True),
    ],
)
def test_the_retrievers_tokens_lie_on_the_chips_where_passages_are_embedded(
    bindings: list[str], holds: bool
) -> None:
    run = tiny_run(*bindings)
    for name in ("train", "search"):
        index = make_program(name, run, make_mesh(MeshConfig(2, 2, 2))).terms
        arrays = 2 if holds else 1
        assert shard_bytes(index["index tokens"]) == 5 * 1024 // 8 * arrays * LANES * 2
    embedding = 16 + 4 if run.corpus.dtype == "int8" else 16 * 4
    assert run.row_bytes == embedding + arrays * LANES * 2


def test_answers_are_written_from_as_many_passages_as_the_evaluation_says() -> None:
    mesh = make_mesh(MeshConfig(8, 1, 1))
    for bindings, k in (([], 4), (["EvalConfig.k=2"], 2)):
        run = tiny_run(*bindings)
        assert make_program("decode", run, mesh).args[2].rows_bk.shape == (8, k)
        assert run.step.k == 4


@pytest.mark.parametrize(
    ("bindings", "found"),
    [
        ([], 20),  # EvalConfig.recall_at is (1, 5, 20)
        (["EvalConfig.k=30"], 30),
        (["EvalConfig.recall_at=(1,)"], 4),
        (["StepConfig.rerank=9"], 20),
        (["StepConfig.rerank=9", "EvalConfig.recall_at=(1, 7)"], 7),
    ],
)
def test_as_many_passages_are_searched_as_the_evaluation_asks_for(
    bindings: list[str], found: int
) -> None:
    mesh = make_mesh(MeshConfig(8, 1, 1))
    program = make_program("search", tiny_run(*bindings), mesh)
    with activate(mesh, tiny_run(*bindings).rules):
        given = jax.eval_shape(program.function, *program.args)
    assert given.rows_bk.shape == (8, found)


def test_what_the_host_gives_a_training_step_is_what_is_ranked_anew() -> None:
    mesh = make_mesh(MeshConfig(8, 1, 1))
    for bindings, found in (([], 4), (["StepConfig.rerank=9", "RETRIEVER_TRAINING='joint'"], 9)):
        run = tiny_run("CorpusConfig.searcher='scann'", *bindings)
        assert make_program("train", run, mesh).args[1].rows_bk.shape == (8, found)


def test_the_step_sends_gradients_and_counts_its_scans(plan: Plan) -> None:
    train = plan.programs[0]
    assert train.work is not None
    assert "all-reduce" in train.work.collectives
    assert train.work.flops > 1.1 * train.work.model_flops  # remat_policy = 'full'
    # The compiler also counts what is no product, and what every device repeats.
    assert train.compiler_flops > 0.8 * train.counted_flops


def test_the_compiled_programs_have_the_products_that_were_counted(plan: Plan) -> None:
    for one in plan.programs:
        assert one.work is not None
        # With passages on all devices, the compiled gradients repeat a few products.
        expected = 1.038 if one.program == "train" else 1
        assert one.work.agreement == pytest.approx(expected, abs=0.01), one.program

    def shown(plan: Plan) -> str:
        console = Console(record=True, width=200)
        show(plan, console)
        return console.export_text()

    assert "warning" not in shown(plan)
    train, *others = plan.programs
    assert train.work is not None
    half = dataclasses.replace(train.work, compiled_flops=train.work.flops / 2)
    off = dataclasses.replace(plan, programs=[dataclasses.replace(train, work=half), *others])
    assert "warning: train: the compiled program has 50% of the products" in shown(off)


def test_the_table_and_the_json_say_the_same(plan: Plan, tmp_path: Path) -> None:
    write_json(plan, tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found == json.loads(json.dumps(as_json(plan)))
    assert found["recommended_mesh"] == "data=2 fsdp=2 model=2"
    assert found["versions"]["jax"] == jax.__version__
    console = Console(record=True, width=120)
    show(plan, console)
    text = console.export_text()
    train = found["programs"][0]
    for figure in (
        f"{train['mfu']:.0%}",
        f"{train['largest_index']:,} passages",
        "data=2 fsdp=2 model=2",
    ):
        assert figure in text
    with pytest.raises(UserError, match="--json"):
        write_json(plan, tmp_path / "missing" / "plan.json")


def test_a_mesh_is_recommended_among_those_that_divide_the_run() -> None:
    run = tiny_run("BATCH_SIZE=4")
    found = candidates(run, jax.devices(), SLICE.chip.hbm_bytes)
    assert found[0] == MeshConfig(4, 1, 2)  # as little sharding as the batch of 4 allows
    assert all(config.data * config.fsdp <= 4 and config.model == 2 for config in found)
    crowded = candidates(run, jax.devices(), 1000)
    assert crowded[0].fsdp == 4
    with pytest.raises(UserError, match="num_heads = 2"):
        candidates(tiny_run("BATCH_SIZE=1"), jax.devices(), SLICE.chip.hbm_bytes)


def test_data_parallelism_and_fsdp_are_both_tried_where_they_have_room() -> None:
    def first(hbm_bytes: int) -> list[MeshConfig]:
        return candidates(tiny_run(), jax.devices(), hbm_bytes)[:2]

    copied, spread = MeshConfig(8, 1, 1), MeshConfig(1, 8, 1)
    assert first(SLICE.chip.hbm_bytes) == [copied, spread]
    kept = [
        sum(shard_bytes(tree) for tree in make_program("train", tiny_run(), mesh).terms.values())
        for mesh in map(make_mesh, (copied, spread))
    ]
    assert kept[0] > kept[1]
    assert first(kept[0]) == [copied, spread]  # full, but with room for what stays
    assert copied not in first(kept[0] - 1) and spread in first(kept[0] - 1)


def test_of_two_slices_only_gradients_leave_one() -> None:
    where, shape = Slice("v5e-4", CHIPS["v5e"], 4), MeshConfig(2, 2, 1, dcn=2)
    found = make_plan(
        tiny_run("RETRIEVER_TRAINING='joint'"), where, jax.devices(), [shape],
        programs=["search"], slices=2,
    )  # fmt: skip
    train, search = found.programs
    assert train.mesh == shape == found.recommended
    assert train.memory.terms["index embeddings"] == 5 * 1024 // 4 * 16 * 4  # a copy on each slice
    assert train.work and train.roof and search.work and search.roof
    sent = {one.axes: one.bytes for one in train.work.network}
    # A float32 gradient of each parameter: half of it is sent, and comes back summed.
    gradients = train.memory.terms["parameters"]
    assert sent["dcn"] == pytest.approx(gradients, rel=0.5)
    assert train.roof.seconds["slices"] == sent["dcn"] / where.chip.dcn_bandwidth
    assert "slices" not in search.roof.seconds or search.roof.seconds["slices"] < 1e-5
    assert as_json(found)["slices"] == 2
    assert as_json(found)["recommended_mesh"] == "dcn=2 data=2 fsdp=2 model=1"
    console = Console(record=True, width=200)
    show(found, console)
    text = console.export_text()
    assert "2 slices of v5e-4" in text and "over dcn (between slices): GiB sent" in text


def test_meshes_of_several_slices_have_them_all() -> None:
    found = candidates(tiny_run(), jax.devices(), SLICE.chip.hbm_bytes, slices=2)
    assert found[:2] == [MeshConfig(4, 1, 1, 2), MeshConfig(1, 4, 1, 2)]
    assert all(config.dcn == 2 for config in found)


def test_a_run_that_is_too_big_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def listened(case: Case, *memory: Any) -> list[str]:
        asked.append(case.program)
        return advise(case, *memory)

    monkeypatch.setattr(planner, "advise", listened)
    chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes=1000)
    found = make_plan(
        tiny_run(),
        Slice("v5e-8", chip, 8),
        jax.devices(),
        [MeshConfig(8, 1, 1)],
        programs=["embed"],
    )
    assert found.recommended is None
    assert asked == ["train", "embed"]
    for one in found.programs:
        assert not one.fits
        assert "a program may use 0.00" in one.advice[0]


def test_what_has_no_room_for_its_arguments_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, mesh = tiny_run(), MeshConfig(8, 1, 1)
    compiled = planner.plan_program("train", run, mesh, SLICE, jax.devices())
    resident = sum(
        shard_bytes(tree) for tree in make_program("train", run, make_mesh(mesh)).terms.values()
    )
    assert compiled.fits and resident < compiled.memory.peak
    monkeypatch.setattr(compiled_programs, "lowered", None)  # fails where it is called
    chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes=resident - 1)
    found = planner.plan_program("train", run, mesh, Slice("v5e-8", chip, 8), jax.devices())
    assert (found.fits, found.work, found.memory.peak) == (False, None, resident)
    assert "needed by its arguments alone" in found.advice[0] and found.largest_index is None
    terms = dict(compiled.memory.terms)
    assert terms.pop("temporaries") > 0
    terms.pop("batch, padding, results")
    assert found.memory.terms == terms
    chip = dataclasses.replace(chip, hbm_bytes=resident)
    with pytest.raises(TypeError):
        planner.plan_program("train", run, mesh, Slice("v5e-8", chip, 8), jax.devices())


SLOW, QUICK, TOO_BIG = MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(4, 2, 1)
HOPELESS = MeshConfig(1, 8, 1)  # by its arguments alone: what it would need is not known


@pytest.mark.parametrize(
    ("seconds", "chosen", "recommended"),
    [
        ({SLOW: 0.3, QUICK: 0.2}, QUICK, QUICK),
        ({QUICK: 0.2, SLOW: 0.3}, QUICK, QUICK),  # whichever is tried first
        ({TOO_BIG: 0.1, SLOW: 0.3}, SLOW, SLOW),  # the shortest step is worth nothing
        ({TOO_BIG: 0.1, QUICK: 0.2, SLOW: 0.3}, QUICK, QUICK),
        ({TOO_BIG: 0.1}, TOO_BIG, None),
        ({HOPELESS: 0.1, TOO_BIG: 0.1}, TOO_BIG, None),
    ],
)
def test_of_several_meshes_the_quickest_that_fits_is_recommended(
    seconds: dict[MeshConfig, float],
    chosen: MeshConfig,
    recommended: MeshConfig | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compiled(name: str, run: Run, mesh: MeshConfig, where: Slice, *_: object) -> ProgramPlan:
        fits = mesh not in (TOO_BIG, HOPELESS)
        size = {TOO_BIG: 10, HOPELESS: 2}.get(mesh, 0) * where.chip.hbm_bytes + 1000
        terms = {} if mesh == HOPELESS else {"temporaries": 1}
        roof = Roofline({"compute": seconds[mesh], "memory": 0.01}, 1e9, where.chip.bf16_flops)
        nothing = Work(1.0, 1.0, 1.0, {})
        return ProgramPlan(
            name, mesh, fits, Memory(terms, size), nothing, roof, None, [], "", None, 1.0, 0.0
        )

    monkeypatch.setattr(planner, "plan_program", compiled)
    found = make_plan(tiny_run(), SLICE, jax.devices(), list(seconds))
    assert [one.mesh for one in found.tried] == list(seconds)
    assert found.recommended == recommended
    # The other programs are compiled for that mesh; where none fits, for the best there is.
    assert [(one.program, one.mesh) for one in found.programs] == [
        (name, chosen) for name in PROGRAMS["train"]
    ]


@pytest.mark.parametrize(
    "binding", ["TrainConfig.passages='none'", "CorpusConfig.searcher='scann'"]
)
def test_without_an_index_on_the_chips_nothing_is_searched(binding: str) -> None:
    run = tiny_run(binding, "RETRIEVER_TRAINING='fixed'", "ReaderConfig.remat_policy='none'")
    meshes = [MeshConfig(8, 1, 1)]
    asked = ["train", "search", "start"]
    found = make_plan(run, SLICE, jax.devices(), meshes, programs=asked)
    assert [one.program for one in found.programs] == ["train"]
    assert [one.program for one in found.starting] == ["start", "restart"]
    assert found.programs[0].largest_index is None


def command(*flags: str) -> int:
    bindings = [f"--gin.{binding}" for binding in (*TINY, *RECIPE[5:])]
    return entry_point.main(["--gin_file=runs/finetune_qa.gin", *bindings, *flags])


def test_without_libtpu_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert command("--topology=v5e-8", "--passages=1000") == 2
    assert "pip install 'atlas-jax[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5e-7", "--passages=9"], "v5e slices have 1, 4, 8"),
        (["--topology=v5e-8", "--passages=0"], "--passages = 0"),
        (["--topology=v5e-8", "--passages=9", "--mesh=8,1"], "--mesh=8,1: expected three"),
        (
            ["--topology=v5e-8", "--passages=9", "--programs=fly"],
            "no program of this run (train) is called fly",
        ),
        (["--topology=v5e-8", "--passages=9", "--gin.MeshConfig.dcn=-1"], "the number of slices"),
    ],
)
def test_slips_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*flags) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_sizes_is_refused() -> None:
    load_gin(["runs/finetune_qa.gin"], RECIPE)
    with pytest.raises(UserError, match="models/NAME.gin"):
        from_gin.plan_run(1000)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chips", ["v5e-8", "v6e-8"])  # v6e: gathers could go to its SparseCores
def test_the_tpu_compiler_takes_the_same_step(chips: str, tmp_path: Path) -> None:
    flags = [f"--topology={chips}", "--passages=5000", "--programs=train,search"]
    train, search = tpu_programs(tmp_path, flags)
    assert train["fits"] and search["fits"]
    assert "all-reduce" in train["collectives_per_chip"]
    # Its text does not say how often a loop runs, but what the counter is compared with.
    assert train["compiled_to_counted_flops"] == pytest.approx(1, abs=0.1)
    assert parse_slice(chips).chip.hbm_bytes > train["peak_bytes_per_chip"]


@pytest.mark.slow
@needs_libtpu
def test_the_tpu_compiler_does_not_copy_the_tokens_of_the_index(tmp_path: Path) -> None:
    """136 tokens are no multiple of 128: the compiler would lay them column by column."""
    flags = ["--topology=v5e-8", "--passages=1000000", "--programs=train,search"]
    longer = ["--gin.PASSAGE_LENGTH=136", "--gin.RetrieverConfig.max_positions=136"]
    both = "--gin.RETRIEVER_TRAINING='joint'"  # the tokens for the retriever, too
    _, search = tpu_programs(tmp_path, [*flags, *longer, both])
    memory = search["bytes_per_chip"]
    # 0.54 of them; 1.04 where both are copied, one after the other.
    assert memory["temporaries"] < 0.75 * memory["index tokens"]


@pytest.mark.slow
@needs_libtpu
def test_the_tpu_compiler_tells_what_leaves_a_slice(tmp_path: Path) -> None:
    both = ["--gin.MeshConfig.dcn=2", "--gin.BATCH_SIZE=16", "--gin.EvalConfig.batch_size=16"]
    flags = ["--topology=v5e-8", "--passages=5000", "--programs=search", *both]
    train, search = tpu_programs(tmp_path, flags)
    assert train["mesh"] == "dcn=2 data=2 fsdp=2 model=2"
    assert "all-reduce between slices" in train["collectives_per_chip"]
    (out,) = (sent for sent in train["network_per_chip"] if sent["axes"] == "dcn")
    assert out["links"] == 0 and out["bytes"] > 0
    # Each slice searches for itself; what was found is then given to all.
    leaves = {kind for kind in search["collectives_per_chip"] if "between slices" in kind}
    assert leaves == {"all-gather between slices"}


def tpu_programs(folder: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """What the plan of the tiny recipe says of its programs, compiled for a TPU."""
    gin = ["--gin_file=runs/finetune_qa.gin", *(f"--gin.{b}" for b in (*TINY, *RECIPE[5:]))]
    # A process of its own: libtpu ends one whose XLA_FLAGS it does not know, as those of the tests.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "atlas_jax.plan", *gin, "--mesh=2,2,2", *flags]
    subprocess.run([*command, f"--json={folder / 'plan.json'}"], env=env, check=True)
    programs: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())["programs"]
    return programs
