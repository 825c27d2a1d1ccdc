"""Leak control: what is taken out of a corpus, and what the report says."""

import json
from pathlib import Path

import pytest

from atlas_jax import remove_leaks as entry
from atlas_jax.core.jsonl import write_jsonl
from tests.training.runs import read_lines

PASSAGES = [
    {
        "id": "1",
        "title": "Quiz",
        "text": "Which river, in the NORTH of Arvo, is the longest? Sann",
    },
    {"id": "2", "title": "Quiz", "text": "which river in the north of arvo is the longest"},
    {"id": "3", "title": "Arvo", "text": "The longest river in the north is the Sann."},
    {"id": "4", "title": "Who leads", "text": "Arvo? Nobody knows."},
]
QUESTIONS = [
    {"id": "q1", "question": "Which river in the north of Arvo is the longest?",
     "answers": ["the Sann"]},
    {"id": "q2", "question": "Who leads Arvo?", "answers": ["Ann"]},
    {"id": "q3", "question": "?", "answers": ["x"]},
]  # fmt: skip


def run(folder: Path, *bindings: str) -> int:
    write_jsonl(folder / "passages.jsonl", PASSAGES)
    write_jsonl(folder / "test.jsonl", QUESTIONS)
    files = {"passages": "passages", "files": "test", "output": "clean", "report": "leaks"}
    return entry.main(
        [
            *(f"--gin.LeakConfig.{name}={folder / file}.jsonl" for name, file in files.items()),
            *(f"--gin.{binding}" for binding in bindings),
        ]
    )


def test_what_shares_eight_words_with_a_question_is_taken_out(tmp_path, capsys):
    assert run(tmp_path) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == {"passages": 4, "removed": 3, "questions": 3, "leaked": 2}
    assert read_lines(tmp_path / "clean.jsonl") == [PASSAGES[2]]
    first, second, third = read_lines(tmp_path / "leaks.jsonl")
    assert first == {
        "passage": "1", "title": "Quiz", "file": str(tmp_path / "test.jsonl"), "question": "q1",
        "side": "question", "shared": "which river in the north of arvo is",
        "answer_in_passage": True,
    }  # fmt: skip
    assert (second["passage"], second["answer_in_passage"]) == ("2", False)
    assert (third["passage"], third["shared"]) == ("4", "who leads arvo")  # across the title


def test_an_answer_can_be_demanded_too(tmp_path, capsys):
    assert run(tmp_path, "LeakConfig.overlap=question_and_answer") == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    assert [p["id"] for p in read_lines(tmp_path / "clean.jsonl")] == ["2", "3", "4"]


def test_longer_runs_take_out_less(tmp_path, capsys):
    assert run(tmp_path, "LeakConfig.ngram=4") == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 4
    assert run(tmp_path, "LeakConfig.ngram=10") == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 3


MOTTO = {"id": "q4", "question": "What is Arvo's motto?",
         "answers": ["By the long river, in the north", "north"]}  # fmt: skip
MOTTOES = [
    {"id": "5", "title": "Seal", "section": "BY the long", "text": "River; in the North, 1907."},
    {"id": "6", "title": "Seal", "text": "A long river in the north."},
    {"id": "7", "title": "Trade", "text": "The north."},
]


@pytest.mark.parametrize(
    ("bindings", "kept"),
    [
        ((), ["3", "5", "6", "7"]),
        (("overlap=question_or_answer",), ["3", "6", "7"]),
        (("overlap=question_or_answer", "min_answer_words=8"), ["3", "5", "6", "7"]),
        (("overlap=question_or_answer", "min_answer_words=1"), []),
        (("overlap=question_or_answer", "ngram=5"), ["3", "7"]),
    ],
)
def test_an_answer_of_some_length_gives_itself_away(tmp_path, monkeypatch, bindings, kept):
    monkeypatch.setattr(f"{__name__}.PASSAGES", [*PASSAGES, *MOTTOES])
    monkeypatch.setattr(f"{__name__}.QUESTIONS", [*QUESTIONS, MOTTO])
    assert run(tmp_path, *(f"LeakConfig.{binding}" for binding in bindings)) == 0
    assert [p["id"] for p in read_lines(tmp_path / "clean.jsonl")] == kept
    if len(kept) == 3:
        *_, last = read_lines(tmp_path / "leaks.jsonl")
        assert (last["passage"], last["question"], last["side"]) == ("5", "q4", "answer")
        assert last["shared"] == "by the long river in the north"  # across section and text
        assert last["answer_in_passage"]


def test_options_are_answers_too(tmp_path):
    options = {"A": "from the hills to the sea", "B": "it does not flow at all"}
    row = {"id": "m", "question": "What of the Sann?", "options": options, "answer": "B"}
    passage = {"id": "8", "title": "Sann", "text": "It flows from the hills to the sea at Ost."}
    write_jsonl(tmp_path / "choices.jsonl", [row])
    write_jsonl(tmp_path / "sann.jsonl", [passage])
    bindings = (
        f"files={tmp_path}/choices.jsonl", f"passages={tmp_path}/sann.jsonl",
        "task=multiple_choice", "overlap=question_or_answer",
    )  # fmt: skip
    assert run(tmp_path, *(f"LeakConfig.{binding}" for binding in bindings)) == 0
    (line,) = read_lines(tmp_path / "leaks.jsonl")
    assert (line["question"], line["side"]) == ("m", "answer")
    assert line["shared"] == "from the hills to the sea"
    assert not line["answer_in_passage"]  # it is the wrong option


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("LeakConfig.ngram=0", "LeakConfig.ngram = 0: expected a whole number, 1 or more"),
        ("LeakConfig.overlap=answer", "LeakConfig.overlap = 'answer': expected one of"),
        (
            "LeakConfig.min_answer_words=0",
            "LeakConfig.min_answer_words = 0: expected a whole",
        ),
        ("LeakConfig.report=''", "LeakConfig.report is not given"),
        ("LeakConfig.files=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, binding, message):
    assert run(tmp_path, binding) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "clean.jsonl").exists()


def test_leaks_are_found_in_scripts_without_blanks(tmp_path, capsys):
    write_jsonl(
        tmp_path / "passages.jsonl",
        [
            {"id": "1", "title": "测验", "text": "问：中国的首都是哪座城市？答：北京"},
            {"id": "2", "title": "北京", "text": "北京是中国的首都。"},
        ],
    )
    row = {"id": "q", "question": "中国的首都是哪座城市?", "answers": ["北京"]}
    write_jsonl(tmp_path / "test.jsonl", [row])
    files = {"passages": "passages", "files": "test", "output": "clean", "report": "leaks"}
    flags = [f"--gin.LeakConfig.{name}={tmp_path / file}.jsonl" for name, file in files.items()]
    assert entry.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    (line,) = read_lines(tmp_path / "leaks.jsonl")
    assert line["passage"] == "1" and line["answer_in_passage"]
