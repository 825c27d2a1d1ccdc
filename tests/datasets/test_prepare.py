"""Published layouts become the project's files; interruptions, counts and broken rows."""

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from atlas_jax import prepare as entry
from atlas_jax.core.errors import UserError
from atlas_jax.datasets import convert
from atlas_jax.datasets.convert import Dataset, Part, prepare, single
from atlas_jax.datasets.passages import page_passages
from atlas_jax.datasets.questions import stream_list
from atlas_jax.datasets.registry import DATASETS, get_dataset
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.tasks.kilt import KILTTask
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.ranking import RankingTask
from atlas_jax.tasks.temporal import TemporalTask


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(name: str, tmp_path: Path) -> dict[str, int]:
    return prepare(get_dataset(name), tmp_path, tmp_path / "out", sample=True)


def test_nq_and_its_splits(tmp_path):
    rows = [{"question": f"q{i}", "answer": [f"a{i}", "b"]} for i in range(4)]
    write(tmp_path / "NQ-open.train.jsonl", *rows)
    write(tmp_path / "NQ-open.dev.jsonl", rows[0])
    (tmp_path / "NQ.dev.idx.json").write_text("[3, 1]")
    assert made("nq", tmp_path) == {"test.jsonl": 1, "train_and_dev.jsonl": 4, "dev.jsonl": 2}
    dev = QATask().load(tmp_path / "out" / "dev.jsonl")
    assert [record.id for record in dev] == ["nq-train-1", "nq-train-3"]
    assert dev[0].fields["answers"] == ["a1", "b"]
    assert dev[0].meta == {}


def test_triviaqa_is_streamed_from_one_object(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas_jax.datasets.questions._CHUNK", 7)
    members = [
        {"Question": "Who?", "QuestionId": "tc_1",
         "Answer": {"Value": "SUNSET BOULEVARD", "Aliases": ["Sunset Blvd", "a ]\u00e9"]}},
        {"Question": "What?", "QuestionId": "tc_2", "Answer": {"Value": "x", "Aliases": ["x"]}},
    ]  # fmt: skip
    path = tmp_path / "unfiltered-web-dev.json"
    path.write_text(json.dumps({"Data": members, "Domain": "Web"}, indent=1))
    assert list(stream_list(path, "Data")) == members
    assert made("triviaqa", tmp_path) == {"test.jsonl": 2}
    first, second = lines(tmp_path / "out" / "test.jsonl")
    assert first == {
        "id": "tc_1", "question": "Who?", "target": "Sunset Boulevard",
        "answers": ["Sunset Blvd", "a ]\u00e9", "SUNSET BOULEVARD"],
    }  # fmt: skip
    assert second["answers"] == ["x"]


def test_a_broken_object_is_told_by_its_character(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"Data": [{"a": 1}, {"a": }]}')
    with pytest.raises(UserError, match=r"x\.json: not JSON at character 26"):
        list(stream_list(path, "Data"))
    path.write_text('{"Rows": []}')
    with pytest.raises(UserError, match="there is no list 'Data'"):
        list(stream_list(path, "Data"))


def test_fever(tmp_path):
    row = {"id": 75397, "verifiable": "VERIFIABLE", "label": "SUPPORTS", "claim": "x is y.",
           "evidence": [[[92206, 104971, "Page", 7]]]}  # fmt: skip
    write(tmp_path / "train.jsonl", row)
    write(tmp_path / "shared_task_test.jsonl", {"id": 7, "claim": "z."})
    assert made("fever", tmp_path) == {"train.jsonl": 1, "test.jsonl": 1}
    assert lines(tmp_path / "out" / "train.jsonl") == [
        {"id": "75397", "claim": "x is y.", "label": "SUPPORTS"}
    ]
    assert FeverTask().load(tmp_path / "out" / "test.jsonl", need_targets=False)[0].id == "7"


def test_mmlu(tmp_path):
    for name in ("dev/anatomy_dev.csv", "dev/virology_dev.csv", "auxiliary_train/arc_easy.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(["A question,\nof two lines?", "w", "x", 'y "z"', "0", "C"])
    assert made("mmlu", tmp_path) == {"five_shot.jsonl": 2, "auxiliary_train.jsonl": 1}
    first, second = lines(tmp_path / "out" / "five_shot.jsonl")
    assert first == {
        "id": "mmlu-anatomy-dev-0000", "question": "A question,\nof two lines?",
        "options": {"A": "w", "B": "x", "C": 'y "z"', "D": "0"}, "answer": "C",
        "subject": "anatomy",
    }  # fmt: skip
    assert second["subject"] == "virology"
    assert len(MultipleChoiceTask().load(tmp_path / "out" / "auxiliary_train.jsonl")) == 1


def test_kilt_tasks_and_pages(tmp_path):
    row = {"id": "1", "input": "who?", "output": [{"answer": "x", "provenance": [
        {"wikipedia_id": "290", "title": "A", "section": "Section::::Abstract."}]}]}  # fmt: skip
    write(tmp_path / "nq-dev-kilt.jsonl", row)
    assert made("kilt", tmp_path) == {"nq-dev.jsonl": 1}
    assert KILTTask().load(tmp_path / "out" / "nq-dev.jsonl")[0].fields["output"] == row["output"]

    page = {"_id": "290", "wikipedia_id": "290", "wikipedia_title": "A", "text": [
        "A\n", "A is a letter.\n", "Section::::History.\n", "It is old.\n",
        "Section::::History:Forms.:Later.\n", "BULLET::::- one\n"]}  # fmt: skip
    write(tmp_path / "kilt_knowledgesource.json", page)
    assert made("kilt_wikipedia", tmp_path) == {"passages.jsonl": 3}
    found = lines(tmp_path / "out" / "passages.jsonl")
    assert [(p["id"], p["section"], p["text"]) for p in found] == [
        ("290:0", "", "A is a letter."),
        ("290:1", "History", "It is old."),
        ("290:2", "History - Forms. - Later", "one"),
    ]


def test_a_long_section_becomes_several_passages():
    found = page_passages("7", "T", ["T", "a " * 150, "b " * 60])
    assert [len(p["text"].split()) for p in found] == [100, 100, 10]
    assert [p["id"] for p in found] == ["7:0", "7:1", "7:2"]


@pytest.mark.parametrize("zipped", [False, True])
def test_wikipedia_passages(tmp_path, zipped):
    text = 'id\ttext\ttitle\n1\t"Aaron is a ""prophet"", they say"\tAaron\n2\tplain\tB\n'
    if zipped:
        (tmp_path / "psgs_w100.tsv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "psgs_w100.tsv").write_text(text)
    assert made("wikipedia", tmp_path) == {"passages.jsonl": 2}
    assert lines(tmp_path / "out" / "passages.jsonl") == [
        {"id": "1", "title": "Aaron", "text": 'Aaron is a "prophet", they say'},
        {"id": "2", "title": "B", "text": "plain"},
    ]


def squad_article(title, *questions):
    """One paragraph and its questions, each with its accepted answers, as SQuAD has them."""
    qas = [{"id": name, "question": f"{name}? ", "answers": [{"text": a, "answer_start": 0}
            for a in answers]} for name, answers in questions]  # fmt: skip
    return {"title": title, "paragraphs": [{"context": f" About {title}.\n", "qas": qas}]}


def write_squad(path, *articles):
    path.write_text(json.dumps({"data": articles, "version": "1.1"}), encoding="utf-8")


def test_squad_open_splits_by_article(tmp_path):
    articles = [squad_article(f"A_{n}", (f"q{n}", ["x", "y", "x"])) for n in range(41)]
    write_squad(tmp_path / "train-v1.1.json", *articles)
    write_squad(tmp_path / "dev-v1.1.json", squad_article("Beyonc%C3%A9_K.", ("t", ["z"])))
    counts = {"passages.jsonl": 42, "train.jsonl": 39, "dev.jsonl": 2, "test.jsonl": 1}
    assert made("squad", tmp_path) == counts
    passages = lines(tmp_path / "out" / "passages.jsonl")
    assert passages[-1] == {"id": "squad-dev-0-0", "title": "Beyonc\u00e9 K.",
                            "text": "About Beyonc%C3%A9_K.."}  # fmt: skip
    assert len({passage["id"] for passage in passages}) == len(passages)
    dev = lines(tmp_path / "out" / "dev.jsonl")
    assert dev[0] == {"id": "q19", "question": "q19?", "answers": ["x", "y"], "title": "A 19",
                      "gold": ["squad-train-19-0"]}  # fmt: skip
    assert dev[1]["id"] == "q39"
    train = QATask().load(tmp_path / "out" / "train.jsonl")
    assert not {"q19", "q39"} & {record.id for record in train}
    with pytest.raises(UserError, match="42 rows, but the published files have 490"):
        prepare(DATASETS["squad"], tmp_path, tmp_path / "whole")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no object", r"data\[1\]: expected an object, found a str"),
        ({"title": "x"}, r"data\[1\]: field 'paragraphs' is missing"),
        (
            squad_article("x", ("q", [3])),
            r"data\[1\].paragraphs\[0\].qas\[0\].answers: field 'text' must",
        ),
    ],
)
def test_a_broken_article_of_squad_is_told_by_its_place(broken, message, tmp_path, capsys):
    write_squad(tmp_path / "dev-v1.1.json", squad_article("a", ("q", ["x"])), broken)
    command = ["squad", f"--source={tmp_path}", f"--out={tmp_path}/out", "--sample"]
    assert entry.main(command) == 2
    assert re.search(rf"dev-v1.1.json: {message}", capsys.readouterr().err)
    assert entry.main([*command, "--gin.RowsConfig.skip_broken=True"]) == 0
    assert [row["id"] for row in lines(tmp_path / "out" / "test.jsonl")] == ["q"]


def test_templama_has_both_years(tmp_path):
    def row(query, year, *names):
        return {"query": query, "date": year, "id": f"{query}_{year}", "relation": "P54",
                "answer": [{"wikidata_id": "Q", "name": name} for name in names]}  # fmt: skip

    write(tmp_path / "test.json", row("Rossi plays for _X_.", "2017", "Yamaha"),
          row("Rossi plays for _X_.", "2018", "Yamaha"), row("Y is _X_.", "2017", "a", "b"),
          row("Rossi plays for _X_.", "2020", "Petronas"), row("Z is _X_.", "2020", "c"),
          row("Y is _X_.", "2020", "b"))  # fmt: skip
    assert made("templama", tmp_path) == {"test.jsonl": 2}
    first, second = lines(tmp_path / "out" / "test.jsonl")
    assert first == {"question": "Rossi plays for <extra_id_0>.", "answers_2017": ["Yamaha"],
                     "answers_2020": ["Petronas"], "changed": True}  # fmt: skip
    assert second["changed"] is False
    assert len(TemporalTask("2020", "2017").load(tmp_path / "out" / "test.jsonl")) == 2


def test_what_has_no_published_number_says_so(tmp_path, capsys):
    write(tmp_path / "val.json", json.loads(GOOD["templama"]))
    write(tmp_path / "nq-dev-kilt.jsonl", json.loads(GOOD["kilt"]))
    uncounted = "not counted: no published number is known"
    for name, told in (("templama", True), ("kilt", False)):
        assert entry.main([name, f"--source={tmp_path}", f"--out={tmp_path}/out", "--sample"]) == 0
        assert (uncounted in capsys.readouterr().out) == told


def test_beir(tmp_path):
    write(
        tmp_path / "corpus.jsonl",
        {"_id": "d1", "title": "T", "text": "x", "metadata": {}},
        {"_id": "d2", "title": "", "text": ""},
        {"_id": "d3", "title": "only", "text": ""},
    )
    write(tmp_path / "queries.jsonl", {"_id": "q1", "text": "who?"}, {"_id": "q2", "text": "y"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td3\t0\n"
    )
    assert made("beir", tmp_path) == {"passages.jsonl": 2, "test.jsonl": 1}
    assert lines(tmp_path / "out" / "test.jsonl") == [
        {"id": "q1", "question": "who?", "qrels": {"d1": 2, "d3": 0}}
    ]
    assert len(RankingTask().load(tmp_path / "out" / "test.jsonl")) == 1
    (tmp_path / "qrels" / "dev.tsv").write_text("q1 d1 2\n")
    with pytest.raises(UserError, match=r"dev\.tsv:1: expected query, passage and a whole number"):
        made("beir", tmp_path)


BROKEN = {
    "fever": ("train.jsonl", '{"id": "x", "claim": "c"}', "train.jsonl:2: field 'id' must be"),
    "kilt": ("nq-dev-kilt.jsonl", '{"id": 1}', "nq-dev-kilt.jsonl:2: field 'input' is missing"),
    "nq": ("NQ-open.dev.jsonl", '{"question": "x"}', "NQ-open.dev.jsonl:2: field 'answer' is"),
    "mmlu": ("test/law_test.csv", "a,b,c,d,e", "law_test.csv:2: expected six columns"),
    "wikipedia": ("psgs_w100.tsv", "2\tx", "psgs_w100.tsv:2: 2 columns where id, text and title"),
    "templama": ("val.json", '{"query": "q", "date": "2017", "answer": ["x"]}',
                 "val.json:2: field 'answer' must hold objects with a 'name'"),
    "triviaqa": ("unfiltered-web-dev.json", '{"Question": "q", "Answer": {"Value": "x"}}]}',
                 "unfiltered-web-dev.json: Data[1].Answer: field 'Aliases' is missing"),
    "kilt_wikipedia": ("kilt_knowledgesource.json",
                       '{"wikipedia_id": "2", "wikipedia_title": "B", "text": [3]}',
                       "kilt_knowledgesource.json:2: field 'text' must hold texts"),
    "beir": ("corpus.jsonl", '{"_id": "e", "title": "T"}', "corpus.jsonl:2: field 'text' is"),
}  # fmt: skip
GOOD = {
    "fever": '{"id": 1, "claim": "c"}', "kilt": '{"id": 1, "input": "q"}',
    "nq": '{"question": "x", "answer": ["y"]}', "mmlu": "q,a,b,c,d,A", "wikipedia": "1\tx\tt",
    "templama": '{"query": "q", "date": "2017", "answer": [{"name": "x"}]}',
    "triviaqa": '{"Data": [{"Question": "q", "Answer": {"Value": "x", "Aliases": ["y"]}},',
    "kilt_wikipedia": '{"wikipedia_id": "1", "wikipedia_title": "A", "text": ["A", "b"]}',
    "beir": '{"_id": "d", "title": "T", "text": "x"}',
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_told_by_file_and_line_and_skipped_when_asked(name, tmp_path, capsys):
    file, row, message = BROKEN[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{GOOD[name]}\n{row}\n", encoding="utf-8")
    command = [name, f"--source={tmp_path}", f"--out={tmp_path}/out", "--sample"]
    assert entry.main(command) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert entry.main([*command, "--gin.RowsConfig.skip_broken=True"]) == 0
    told = capsys.readouterr()
    assert f"skipped: {tmp_path}" in told.err and message in told.err


def test_another_number_of_rows_is_refused_unless_it_is_a_sample(tmp_path):
    write(tmp_path / "NQ-open.dev.jsonl", {"question": "q", "answer": ["a"]})
    with pytest.raises(UserError, match="1 rows, but the published files have 3,610"):
        prepare(DATASETS["nq"], tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_absent_files_are_told_with_where_they_are_published(tmp_path, capsys):
    assert entry.main(["nq", f"--source={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "holds none of the files of nq: NQ-open.dev.jsonl" in error
    assert "they are published at" in error
    assert "google-research-datasets/natural-questions" in error
    assert entry.main(["nqq"]) == 2
    assert "no data set is called 'nqq'; did you mean nq?" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_SAVE_EVERY", 10)
    write(tmp_path / "source.txt", "x")
    opened: list[int] = []

    def dataset(fails_at: int) -> Dataset:
        def read(paths, rows):
            opened.append(fails_at)
            for number in range(35):
                if number == fails_at:
                    raise KeyboardInterrupt
                yield [{"n": number}] * (number % 3)

        return Dataset("d", "", (), (Part("out.jsonl", ("source.txt",), 35, read),))

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset(27), tmp_path, out)
    assert not (out / "out.jsonl").exists()
    note = json.loads((out / ".out.jsonl.progress.json").read_text())
    assert (note["read"], note["written"]) == (20, 19)
    assert prepare(dataset(-1), tmp_path, out) == {"out.jsonl": 34}
    expected = [{"n": n} for n in range(35) for _ in range(n % 3)]
    assert lines(out / "out.jsonl") == expected
    assert sorted(path.name for path in out.iterdir()) == ["out.jsonl", "prepared.json"]
    assert prepare(dataset(-1), tmp_path, out) == {"out.jsonl": -1}  # there already
    assert opened == [27, -1]


def test_an_interrupted_run_of_other_files_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_SAVE_EVERY", 1)
    source = write(tmp_path / "source.txt", "x")

    def read(paths, rows):
        text = paths[0].read_text()
        for number in range(3):
            if number == 2 and "x" in text:
                raise KeyboardInterrupt
            yield from single([{"text": text.strip()}])

    dataset = Dataset("d", "", (), (Part("out.jsonl", ("source.txt",), None, read),))
    with pytest.raises(KeyboardInterrupt):
        prepare(dataset, tmp_path, tmp_path / "out")
    write(source, "another")
    assert prepare(dataset, tmp_path, tmp_path / "out") == {"out.jsonl": 3}
    assert lines(tmp_path / "out" / "out.jsonl") == [{"text": '"another"'}] * 3


def test_hashes_are_noted_and_verified(tmp_path, capsys):
    source = write(tmp_path / "NQ-open.dev.jsonl", {"question": "q", "answer": ["a"]})
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    out = tmp_path / "out"
    command = ["nq", f"--source={tmp_path}", f"--out={out}", "--sample"]

    sums = tmp_path / "SHA256SUMS"  # found without being named
    sums.write_text(f"{'0' * 64}  NQ-open.dev.jsonl\n")
    assert entry.main(command) == 2
    error = capsys.readouterr().err
    assert f"its SHA-256 is {digest}, but {'0' * 64} is asked for" in error
    assert not out.exists()

    given = tmp_path / "other.txt"
    given.write_text(f"{digest.upper()} *./NQ-open.dev.jsonl\n\n{'1' * 64}  of another file\n")
    assert entry.main([*command, f"--checksums={given}"]) == 0
    written = hashlib.sha256((out / "test.jsonl").read_bytes()).hexdigest()
    assert f"test.jsonl: 1 rows, sha256 {written}" in capsys.readouterr().out
    assert json.loads((out / "prepared.json").read_text()) == {
        "test.jsonl": {
            "rows": 1, "sha256": written, "sources": {"NQ-open.dev.jsonl": digest}, "sample": True
        }
    }  # fmt: skip

    given.write_text(f"{digest}  NQ-open.dev.jsonl\nsha256 of nothing\n")
    assert entry.main([*command, f"--checksums={given}"]) == 2
    assert "other.txt:2: expected 64 hexadecimal digits" in capsys.readouterr().err
    assert entry.main([*command, f"--checksums={tmp_path}/none"]) == 2
    assert "none: no such file" in capsys.readouterr().err


def fever(path, claim):
    return write(path, {"id": 1, "claim": claim, "label": "SUPPORTS"})


def test_a_file_of_another_source_or_sample_is_made_anew(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    command = ["fever", f"--source={source}", f"--out={out}", "--sample"]
    fever(source / "train.jsonl", "An old claim.")
    assert entry.main(command) == 0
    assert entry.main(command) == 0
    assert "already there" in capsys.readouterr().out
    fever(source / "train.jsonl", "A new claim.")
    assert entry.main(command) == 0
    assert "made anew, for it was made of other files" in capsys.readouterr().err
    assert "A new claim." in (out / "train.jsonl").read_text()
    assert entry.main(command[:-1]) == 2  # the whole was asked for
    assert "1 rows, but the published files have 145,449" in capsys.readouterr().err


def test_a_file_that_prepare_did_not_write_is_not_already_there(tmp_path, capsys):
    fever(tmp_path / "train.jsonl", "A claim.")
    assert entry.main(["fever", f"--source={tmp_path}", f"--out={tmp_path}", "--sample"]) == 2
    assert "is there, and no command of this kind wrote it" in capsys.readouterr().err
    assert entry.main(["fever", f"--source={tmp_path}", f"--out={tmp_path}/o", "--sample"]) == 0
    (tmp_path / "o" / "train.jsonl").write_text("changed")
    assert entry.main(["fever", f"--source={tmp_path}", f"--out={tmp_path}/o", "--sample"]) == 2
    assert "was changed since it was written" in capsys.readouterr().err


def test_what_is_written_training_takes(tmp_path, capsys):
    answer = {"Value": " ", "Aliases": ["", "Paris", " ", "Paris"]}
    data = {"Data": [{"Question": "q", "QuestionId": "1", "Answer": answer}]}
    (tmp_path / "unfiltered-web-dev.json").write_text(json.dumps(data))
    command = ["triviaqa", f"--source={tmp_path}", "--sample"]
    assert entry.main([*command, f"--out={tmp_path}/a"]) == 0
    row = json.loads((tmp_path / "a" / "test.jsonl").read_text())
    assert (row["answers"], row["target"]) == (["Paris"], "Paris")
    for aliases, problem in (([["x"]], "must hold texts"), ([""], "holds no text")):
        data["Data"][0]["Answer"] = {"Value": "", "Aliases": aliases}
        (tmp_path / "unfiltered-web-dev.json").write_text(json.dumps(data))
        assert entry.main([*command, f"--out={tmp_path}/b"]) == 2
        assert f"Data[0].Answer {problem}" in capsys.readouterr().err


def test_kilts_triviaqa_needs_its_questions(tmp_path, capsys):
    row = {"id": "1", "input": "", "output": []}
    write(tmp_path / "triviaqa-dev_id-kilt.jsonl", row)
    assert entry.main(["kilt", f"--source={tmp_path}", f"--out={tmp_path}/o", "--sample"]) == 2
    assert "scripts/get_triviaqa_input.py fills them in" in capsys.readouterr().err
    (tmp_path / "triviaqa-dev_id-kilt.jsonl").unlink()
    write(tmp_path / "triviaqa-dev-kilt.jsonl", {**row, "input": "Who?"})
    write(tmp_path / "other-dev-kilt.jsonl", row)
    assert entry.main(["kilt", f"--source={tmp_path}", f"--out={tmp_path}/o", "--sample"]) == 0
    assert (tmp_path / "o" / "triviaqa-dev.jsonl").is_file()
    assert "other-dev-kilt.jsonl: not taken" in capsys.readouterr().err


def test_a_stray_quote_does_not_join_rows(tmp_path, capsys):
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"a\tA\n2\tb"\tB\n')
    source = [f"--source={tmp_path}", f"--out={tmp_path}/o", "--sample"]
    assert entry.main(["wikipedia", *source]) == 2
    assert "joins several rows to one" in capsys.readouterr().err
