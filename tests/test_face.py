"""The Python face: load, ask, search, score, save, train; from any thread, without gin."""

import gc
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

import atlas_jax
from atlas_jax import from_gin
from atlas_jax.answering.atlas import Atlas
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.answering.config import EvalConfig
from atlas_jax.core.config import load_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.corpus.config import CorpusConfig, CorpusSpec, ReadConfig
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.models.config import ModelConfig, ModelSpec
from atlas_jax.reader.generate import GenerationConfig
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.tasks.kilt import KILTTask
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.registry import TASKS
from atlas_jax.tasks.temporal import TemporalTask
from atlas_jax.training.config import StepConfig, TrainConfig
from tests.training.runs import write_run

SETTINGS: dict[str, Any] = {
    "read": ReadConfig(k=3, reader_length=112),
    "data": DataConfig(query_length=64, retriever_query_length=48, target_length=8),
    "formats": StoreConfig(reader_length=48, retriever_length=48),
    "generation": GenerationConfig(max_length=4),
}
EDITIONS = {"edition": "2026", "other": "2015"}
QUESTIONS = ["What is the capital of Arvo?", "What is the capital of Bera?"]


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    reader_tokenizer_file: Path,
    retriever_tokenizer_file: Path,
) -> Path:
    """A folder with passages, questions and a small model."""
    folder = tmp_path_factory.mktemp("face")
    load_gin([str(write_run(folder, reader_tokenizer_file, retriever_tokenizer_file))])
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(from_gin.models(), mesh, rules)
        export_model(folder / "model", made.models, made.params, made.tokenizers, "float32", {})
    return folder


@pytest.fixture(scope="module")
def atlas(work: Path) -> Atlas:
    return atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)


def test_one_question_and_several_get_the_same_answers(atlas: Atlas) -> None:
    one = atlas.ask(QUESTIONS[0])
    many = atlas.ask(QUESTIONS * 6)
    assert one.question == QUESTIONS[0] and len(one.passages) == 3
    assert [a.text for a in many] == [a.text for a in atlas.ask(QUESTIONS)] * 6
    assert many[0].text == one.text
    assert one.log_probability == pytest.approx(many[0].log_probability, abs=1e-5)
    scores = [passage.score for passage in one.passages]
    assert scores == sorted(scores, reverse=True)
    assert one.passages[0].attention is None


def test_k_explanations_and_exclusions_are_as_asked(atlas: Atlas) -> None:
    asked = atlas.ask(QUESTIONS[0], k=2, explain=True)
    assert len(asked.passages) == 2
    assert all(p.attention is not None and p.left_out is not None for p in asked.passages)
    first = [p.id for p in atlas.retrieve(QUESTIONS[0], k=5)]
    without = atlas.retrieve(QUESTIONS[0], k=3, exclude=first[:2])
    assert [p.id for p in without] == first[2:]
    assert [p.id for p in atlas.ask(QUESTIONS[0], exclude=[first[0]]).passages] == first[1:4]
    both = atlas.retrieve(QUESTIONS, k=2)
    assert [p.id for p in both[0]] == first[:2] and len(both[1]) == 2


def test_a_replaced_passage_is_found_and_read_as_one_of_the_corpus_would_be(
    atlas: Atlas, work: Path
) -> None:
    first = atlas.ask(QUESTIONS[0], explain=True).passages[1]
    text = "Bera is far away, and nobody asks about its rivers."
    records = [json.loads(line) for line in (work / "passages.jsonl").read_text().splitlines()]
    swapped = work / "swapped.jsonl"
    swapped.write_text(
        "".join(
            json.dumps({**one, "text": text} if one["id"] == first.id else one) + "\n"
            for one in records
        )
    )
    other = atlas_jax.load(work / "model", passages=swapped, **SETTINGS)
    for k in (3, 16):
        expected = other.ask(QUESTIONS[0], k=k, explain=True)
        found = atlas.ask(QUESTIONS[0], k=k, explain=True, replace={first.id: text})
        assert found.text == expected.text
        assert [(p.id, p.text) for p in found.passages] == [
            (p.id, p.text) for p in expected.passages
        ]
        for name in ("score", "attention", "left_out"):
            values = [[getattr(p, name) for p in one.passages] for one in (found, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert text in {p.text for p in found.passages}
    assert atlas.retrieve(QUESTIONS[0], k=16, replace={first.id: text})[0].text
    with pytest.raises(atlas_jax.UserError, match="no passage of the corpus has the id 'nowhere'"):
        atlas.ask("What?", replace={"nowhere": "text"})
    with pytest.raises(atlas_jax.UserError, match="is empty; exclude it"):
        atlas.ask("What?", replace={first.id: " "})


def test_a_choice_is_one_of_those_given(atlas: Atlas) -> None:
    answer = atlas.ask(QUESTIONS[0], choices=["Lindel", "Tomund"])
    assert answer.text in ("Lindel", "Tomund") and -10 < answer.log_probability < 0
    with pytest.raises(atlas_jax.UserError, match="two or more different texts"):
        atlas.ask(QUESTIONS[0], choices=["Lindel", "Lindel"])


def test_a_second_thread_answers_without_compiling(atlas: Atlas) -> None:
    atlas.warm_up()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if "compile" in event else None
    )
    expected, found = atlas.ask(QUESTIONS), []
    thread = threading.Thread(target=lambda: found.append(atlas.ask(QUESTIONS)))
    thread.start()
    thread.join()
    assert found == [expected]
    assert compiled == []


def test_two_models_live_side_by_side(atlas: Atlas, work: Path) -> None:
    closed = atlas_jax.load(work / "model", **SETTINGS)
    before = atlas.ask(QUESTIONS[0])
    assert closed.ask(QUESTIONS[0]).passages == ()
    assert atlas.ask(QUESTIONS[0]) == before
    with pytest.raises(atlas_jax.UserError, match="there is no corpus to search"):
        closed.retrieve(QUESTIONS[0])
    with pytest.raises(atlas_jax.UserError, match="a closed book has no passages"):
        closed.ask(QUESTIONS[0], explain=True)


def test_a_temporary_store_goes_with_its_atlas(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    atlas = atlas_jax.load(work / "model", passages=work / "passages.jsonl", **SETTINGS)
    assert atlas.retrieve(QUESTIONS[0], k=1)[0].text
    assert len(list(tmp_path.glob("atlas-jax-*/store"))) == 1
    del atlas
    gc.collect()
    assert list(tmp_path.glob("atlas-jax-*")) == []
    with pytest.raises(atlas_jax.UserError, match="nowhere.jsonl"):
        atlas_jax.load(work / "model", passages=work / "nowhere.jsonl", **SETTINGS)
    assert list(tmp_path.glob("atlas-jax-*")) == []


def test_a_saved_model_answers_alike(atlas: Atlas, work: Path) -> None:
    atlas.save(work / "saved")
    again = atlas_jax.load(
        work / "saved", store=work / "kept", passages=work / "passages.jsonl", **SETTINGS
    )
    assert again.ask(QUESTIONS) == atlas.ask(QUESTIONS)
    count = atlas_jax.build_index(
        work / "saved", store=work / "kept", index=work / "index", formats=SETTINGS["formats"]
    )
    assert count == 16
    indexed = atlas_jax.load(work / "saved", store=work / "kept", index=work / "index", **SETTINGS)
    assert indexed.ask(QUESTIONS) == atlas.ask(QUESTIONS)


def test_a_file_is_scored(atlas: Atlas, work: Path) -> None:
    done = atlas.evaluate(work / "train.jsonl", max_rows=3, batch_size=8, recall_at=(1, 5))
    assert set(done.scores) >= {"exact_match", "f1", "recall@1", "recall@5"}
    assert len(done.answers) == 3 and len(done.answers[0].passages) == 5
    with pytest.raises(atlas_jax.UserError, match="no setting is called bach_size"):
        atlas.evaluate(work / "train.jsonl", bach_size=8)


def test_bad_input_is_named(atlas: Atlas, work: Path) -> None:
    with pytest.raises(atlas_jax.UserError, match="question 2 of 2 is empty"):
        atlas.ask(["What?", " "])
    with pytest.raises(atlas_jax.UserError, match="no passage of the corpus has the id 'nowhere'"):
        atlas.ask("What?", exclude=["nowhere"])
    with pytest.raises(atlas_jax.UserError, match="k asks for 99 passages, but the corpus has 16"):
        atlas.ask("What?", k=99)
    with pytest.raises(atlas_jax.UserError, match="an index needs the passages"):
        atlas_jax.load(work / "model", index=work / "index")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_that_can_be_typed_forms_its_own_query(name: str) -> None:
    task: Any = TASKS[name](**EDITIONS if name == "temporal" else {})
    if not hasattr(task, "typed"):
        assert name in {
            "multiple_choice", "ranking", "mlm", "lm", "section", "bart", "mass", "cloze",
            "sentences",
        }  # fmt: skip
        return
    example = task.typed("Who lives there?")
    assert "Who lives there" in example.query_text  # a template may leave out the last sign
    assert "Who lives there?" in example.retriever_text
    assert example.retriever_text and not example.answers and not example.target_text


def test_tasks_of_each_kind_are_asked(work: Path) -> None:
    settings = {**SETTINGS, "passages": work / "passages.jsonl", "store": work / "kept"}
    for task in (FeverTask(answer_by="likelihood"), TemporalTask(**EDITIONS), KILTTask()):
        answer = atlas_jax.load(work / "model", task=task, **settings).ask(QUESTIONS[0])
        assert answer.passages
        if isinstance(task, FeverTask):
            assert answer.text in {"true", "false", "maybe"}
    with pytest.raises(atlas_jax.UserError, match="'multiple_choice' is not for typed"):
        atlas_jax.load(work / "model", task=MultipleChoiceTask(), **settings).ask("What?")


@pytest.mark.slow
def test_a_run_made_of_configs_trains_and_can_be_run_again(work: Path) -> None:
    spec = ModelSpec(ModelConfig(reader=str(work / "model"), retriever=str(work / "model")))
    run = atlas_jax.TrainRun(
        train=TrainConfig(
            model_dir=str(work / "run"), file=str(work / "train.jsonl"), total_steps=2,
            log_every=1,
        ),
        task=QATask(answer_choice="first"),
        eval_task=QATask(answer_choice="first"),
        models=spec,
        corpus=CorpusSpec(
            CorpusConfig(passages=str(work / "passages.jsonl"), store=str(work / "kept"),
                         embed_batch_size=8),
            SETTINGS["formats"],
        ),
        step=StepConfig(k=3, reader_length=112),
        data=DataConfig(batch_size=8, query_length=64, retriever_query_length=48, target_length=8),
        evaluation=EvalConfig(batch_size=8),
        generation=SETTINGS["generation"],
    )  # fmt: skip
    trained = atlas_jax.train(run)
    assert trained.steps == 2 and trained.skipped == 0
    assert [row["step"] for row in trained.metrics() if "train/reader_loss" in row] == [1, 2]
    load_gin([str(work / "run" / "config.gin")])
    again = from_gin.train_run()
    assert again.train == run.train and again.step == run.step and again.task == run.task
    assert again.corpus == run.corpus and again.optimizers == run.optimizers
    loaded = atlas_jax.load(trained.model, store=work / "kept", **SETTINGS)
    assert loaded.ask(QUESTIONS[0]).passages


def test_the_face_is_small_and_imports_nothing_until_used() -> None:
    code = (
        "import sys, json, atlas_jax; light = 'jax' in sys.modules; "
        "import atlas_jax.train; import atlas_jax.build_index; "
        "print(json.dumps([light, callable(atlas_jax.train), callable(atlas_jax.build_index), "
        "sorted(atlas_jax.__all__)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light, train, build, names = json.loads(done.stdout)
    assert (light, train, build) == (False, True, True)
    assert len(names) <= 12 and all(getattr(atlas_jax, name).__doc__ for name in names)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = atlas_jax.lode
