"""GLUE's tables, LM-BFF's and TREC's own files become the classification tasks' lines."""

import json
from pathlib import Path

import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.datasets.convert import prepare
from atlas_jax.datasets.registry import get_dataset
from atlas_jax.tasks.classification import CLASSIFICATION

# By task: the file, its content, and the lines that come of it, without ids.
NLI = 'index\tsentence1\tsentence2\tgold_label\n0\tA "b".\tC.\t'
FILES = {
    "sst2": ("train.tsv", 'sentence\tlabel\nso "bad \t0\n',
             {"text": 'so "bad', "label": "negative"}),
    "cola": ("dev.tsv", "gj04\t0\t*\tCats are.\n", {"text": "Cats are.", "label": "unacceptable"}),
    "mnli": ("dev_matched.tsv", f"{NLI}neutral\n1\tx\ty\t-\n",
             {"premise": 'A "b".', "hypothesis": "C.", "label": "neutral"}),
    "snli": ("snli_1.0_dev.jsonl",
             '{"gold_label": "-", "sentence1": "x", "sentence2": "y"}\n'
             '{"gold_label": "entailment", "sentence1": "A", "sentence2": "B"}\n',
             {"premise": "A", "hypothesis": "B", "label": "entailment"}),
    "rte": ("test.tsv", "index\tsentence1\tsentence2\n0\tA.\tB.\n",
            {"premise": "A.", "hypothesis": "B."}),
    "qnli": ("train.tsv", "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tentailment\n",
             {"question": "A?", "sentence": "B.", "label": "entailment"}),
    "qqp": ("train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t1\n",
            {"a": "A?", "b": "B?", "label": "duplicate"}),
    "mrpc": ("msr_paraphrase_test.txt",
             "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tA.\tB.\n",
             {"a": "A.", "b": "B.", "label": "not_equivalent"}),
    "mr": ("train.csv", '1,"so, so"\n', {"text": "so, so", "label": "positive"}),
    "cr": ("train.csv", "0,bad\n", {"text": "bad", "label": "negative"}),
    "mpqa": ("test.csv", "1,good\n", {"text": "good", "label": "positive"}),
    "subj": ("train.csv", "0,i like\n", {"text": "i like", "label": "subjective"}),
    "trec": ("test.csv", "2,What is the AMA ?\n", {"text": "What is the AMA ?", "label": "ABBR"}),
}  # fmt: skip


@pytest.mark.parametrize("task", CLASSIFICATION, ids=lambda task: task.name)
def test_a_published_file_becomes_the_tasks_lines(task, tmp_path: Path) -> None:
    name, content, wanted = FILES[task.name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    (output, count), *_ = prepare(
        get_dataset(task.name), tmp_path, tmp_path / "out", sample=True
    ).items()
    assert count == 1
    (line,) = (tmp_path / "out" / output).read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found.pop("id").startswith(f"{task.name}-{Path(name).stem}-")
    assert found == wanted
    (record,) = task().load(tmp_path / "out" / output, need_targets="label" in wanted)
    assert record.fields.get("label") == wanted.get("label")


def test_trec_in_its_own_form(tmp_path: Path) -> None:
    raw = "NUM:date When did Caf\u00e9 open ?\n".encode("latin-1")
    (tmp_path / "TREC_10.label").write_bytes(raw)
    assert prepare(get_dataset("trec"), tmp_path, tmp_path, sample=True) == {"test.jsonl": 1}
    line = json.loads((tmp_path / "test.jsonl").read_text(encoding="utf-8"))
    assert (line["text"], line["label"]) == ("When did Caf\u00e9 open ?", "NUM")


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("sst2", "train.tsv", "sentence\tlabel\nx\t2\n", "train.tsv:2: column 'label' is '2'"),
        ("sst2", "train.tsv", "x\t1\n", "train.tsv:1: expected a line that names the columns sent"),
        ("rte", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\n",
         "dev.tsv:2: the row ends before its column 'sentence2'"),
        ("mr", "train.csv", "5,x\n", "train.csv:1: the label is '5', expected one of '0', '1'"),
        ("trec", "TREC_10.label", "WHO:x y\n", "TREC_10.label:1 is 'WHO', expected one of 'DESC'"),
        ("rte", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
         "dev.tsv: 1 rows, but the published files have 277"),
    ],
)  # fmt: skip
def test_a_broken_table_is_refused(name, file, content, says, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        prepare(get_dataset(name), tmp_path, tmp_path / "out", sample="277" not in says)


def test_broken_rows_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nx\n\t1\ny\t1\n", encoding="utf-8")
    skipping = RowsConfig(skip_broken=True)
    made = prepare(get_dataset("sst2"), tmp_path, tmp_path, sample=True, rows=skipping)
    assert made == {"train.jsonl": 1}
