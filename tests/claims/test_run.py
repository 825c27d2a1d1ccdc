"""Rows from their steps to the table: with stand-ins for the entry points, and in earnest."""

import json
from pathlib import Path

import pytest

from atlas_jax.claims import run, runner
from atlas_jax.claims.bench import CLOSED_BOOK, Bench
from atlas_jax.claims.data import Data
from atlas_jax.claims.pairs import NANO
from atlas_jax.claims.rows import Claim, Group, Row, selected
from atlas_jax.claims.runner import Runner
from atlas_jax.claims.steps import Keys, Made, Step
from atlas_jax.demo import factbook
from atlas_jax.train import main as train_main
from tests.demo.small import prepare_small, tiny_checkpoint

TINY = {"TRAIN_STEPS": 1, "WARMUP_STEPS": 0, "K": 2, "BATCH_SIZE": 8, "TEXT_LENGTH": 64}
LESSON = {**TINY, "K": 1, "QUERY_LENGTH": 16, "PASSAGE_LENGTH": 32}


def _closed(bench, seed):
    return bench.questions(seed, {**TINY, **CLOSED_BOOK}, before=LESSON)


def _open(bench, seed):
    return bench.questions(seed, TINY, before=LESSON)


GROUP = Group(
    "small", "A small question", "nowhere", ("exact_match", "recall@5"),
    (Row("closed", _closed), Row("open", _open),
     Row("deeper", lambda b, seed: b.evaluate(_open(b, seed), {"K": 3}))),
    (Claim("Passages help", "open", "closed"),),
)  # fmt: skip


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A call for all rows of GROUP with two seeds."""
    monkeypatch.setattr(factbook, "prepare", prepare_small)
    monkeypatch.setattr(runner.jax, "clear_caches", lambda: None)
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")

    def make(only="", seeds=(0, 1), minutes=0.0):
        return run.Plan(
            Bench(Data(tmp_path / "data", None, 3), checkpoint, NANO),
            Runner(tmp_path / "runs"),
            selected([GROUP], only),
            seeds,
            minutes,
            tmp_path / "report",
        )

    return make


@pytest.fixture
def calls(monkeypatch):
    """Entry points that only note their configuration and say what they scored."""
    made = []

    def command(name, scores):
        def main(arguments):
            made.append((name, _configuration(arguments)))
            print(json.dumps(scores))
            return 0

        return main, runner._printed

    scores = {"exact_match": 0.5}
    for name in ("train", "evaluate", "build_index"):
        monkeypatch.setitem(runner.COMMANDS, name, command(name, scores))
    return made


def _configuration(arguments):
    return Path(arguments[0].removeprefix("--gin_file=")).read_text(encoding="utf-8")


def _measured(plan):
    return json.loads(plan.json.read_text(encoding="utf-8"))["measured"]


def test_what_is_done_is_not_done_again(plan, calls):
    assert run.run(plan(), [GROUP]) == 0
    names = [name for name, _ in calls]
    # One index for all, a lesson a seed, and one training for the two rows that need it.
    assert sorted(names) == ["build_index"] + 2 * ["evaluate"] + 6 * ["train"]
    assert names[:2] == ["train", "build_index"]
    assert {row: set(seeds) for row, seeds in _measured(plan()).items()} == {
        f"small/{row.name}": {"0", "1"} for row in GROUP.rows
    }
    assert run.run(plan(), [GROUP]) == 0 and len(calls) == 9
    (plan().bench.checkpoint / "config.json").write_text('{"better": true}')
    assert run.run(plan(only="small/open"), [GROUP]) == 0
    assert sorted(name for name, _ in calls[9:]) == ["build_index"] + 4 * ["train"]
    assert set(_measured(plan())) == {"small/open"}  # the others were of another checkpoint


def test_a_failed_row_is_reported_and_the_others_go_on(plan, calls, monkeypatch, capsys):
    good, outcome = runner.COMMANDS["train"]

    def main(arguments):
        text = _configuration(arguments)
        lesson, closed = "PASSAGE_SOURCE = 'file'", "TrainConfig.passages = 'none'"
        if lesson in text or closed in text:
            return good(arguments)
        if "TrainConfig.seed = 1" in text:
            raise RuntimeError("a bug")
        print("no such thing")
        return 2

    monkeypatch.setitem(runner.COMMANDS, "train", (main, outcome))
    assert run.run(plan(), [GROUP]) == run.FAILED
    told = capsys.readouterr().err
    assert "small/open seed 0: no such thing (exit code 2" in told
    assert "small/open seed 1: RuntimeError: a bug" in told
    assert "small/deeper seed 0: needs train" in told
    assert set(_measured(plan())) == {"small/closed"}
    assert "| open | not run |" in plan().table.read_text(encoding="utf-8")
    monkeypatch.setitem(runner.COMMANDS, "train", (good, outcome))
    assert run.run(plan(), [GROUP]) == 0  # what failed is tried again
    assert len(_measured(plan())) == 3


def test_the_time_ends_between_runs_and_an_interruption_keeps_what_is_done(
    plan, calls, monkeypatch
):
    assert run.run(plan(minutes=1e-9), [GROUP]) == 0 and not calls
    assert _measured(plan()) == {}
    good, outcome = runner.COMMANDS["train"]
    interrupted = lambda a: 130 if len(calls) == 3 else good(a)  # noqa: E731
    monkeypatch.setitem(runner.COMMANDS, "train", (interrupted, outcome))
    assert run.run(plan(), [GROUP]) == 130
    assert {row: list(seeds) for row, seeds in _measured(plan()).items()} == {"small/closed": ["0"]}


def test_a_key_is_the_content_of_what_is_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("one")

    def key(file="a", earlier=None, **bindings):
        index = Made("index", earlier) if earlier else tmp_path / "a"
        found = {"PASSAGES": tmp_path / file, "INDEX": index, **bindings}
        found |= {"INITIAL_CHECKPOINT_PATH": tmp_path / "a", "STORE": Made("store")}
        return Keys().of(Step("build_index", ("runs/build_index.gin",), found))

    assert key() == key("b")  # another place
    assert key() != key(EMBED_BATCH_SIZE=8)
    (tmp_path / "b").write_text("two")
    assert key() != key("b")
    steps = [Step("remove_leaks", ("runs/remove_leaks.gin",),
                  {"PASSAGES": tmp_path / file, "EVAL_FILE": tmp_path / "a",
                   "OUTPUT": Made("o"), "REPORT": Made("r")}) for file in ("a", "b")]  # fmt: skip
    assert key(earlier=steps[0]) != key(earlier=steps[1])


def test_bad_flags_are_named(tmp_path, capsys):
    assert run.main(["--only", "loses", "--out", str(tmp_path)]) == 2
    assert "did you mean losses" in capsys.readouterr().err
    assert run.main(["--data", str(tmp_path / "none")]) == 2
    assert run.main(["--questions", "0"]) == 2


@pytest.mark.slow
def test_rows_run_through_the_real_entry_points(
    tmp_path, monkeypatch, reader_tokenizer_file, retriever_tokenizer_file
):
    monkeypatch.setattr(factbook, "prepare", prepare_small)
    checkpoint = tiny_checkpoint(
        tmp_path / "model", reader_tokenizer_file, retriever_tokenizer_file
    )
    plan = run.Plan(
        Bench(Data(tmp_path / "data", None, 3), checkpoint, NANO),
        Runner(tmp_path / "runs"),
        selected([GROUP], ""),
        (0,),
        0.0,
        tmp_path / "report",
    )
    assert run.run(plan, [GROUP]) == 0
    found = _measured(plan)
    assert set(found) == {f"small/{row.name}" for row in GROUP.rows}
    assert "recall@5" not in found["small/closed"]["0"]["scores"]
    trained, deeper = (found[f"small/{name}"]["0"]["scores"] for name in ("open", "deeper"))
    assert trained["recall@5"] == deeper["recall@5"]  # the same towers, the same index
    # The gin file of a row runs it again, and it scores the same.
    folder = plan.runner.folder(_open(plan.bench, 0))
    again = [f"--gin_file={folder}/config.gin", f"--gin.TrainConfig.model_dir={tmp_path}/again"]
    assert train_main(again) == 0
    assert runner._last_evaluation(tmp_path / "again", []) == trained
