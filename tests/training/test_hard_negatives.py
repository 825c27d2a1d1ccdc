"""The retriever alone: ranked and scored, its hard negatives found and learnt against."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from atlas_jax import prepare, retrieve, train_retriever
from atlas_jax.training.metrics import read_metrics
from tests.training.runs import read_lines, write_lines, write_run


@pytest.fixture
def gin_file(tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> Path:
    return write_run(tmp_path, reader_tokenizer_file, retriever_tokenizer_file)


def flags(gin_file: Path, *bindings: str) -> list[str]:
    return [f"--gin_file={gin_file}", *(f"--gin.{binding}" for binding in bindings)]


@pytest.mark.slow
def test_a_benchmark_in_beirs_layout_is_prepared_and_scored(
    gin_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gin_file.parent
    passages = read_lines(folder / "passages.jsonl")
    write_lines(folder / "corpus.jsonl", [{"_id": p.pop("id"), **p} for p in passages])
    queries = [{"_id": f"q{i}", "text": f"the capital {i}"} for i in range(3)]
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    rows = [
        (f"q{i}", f"{letter}{i}", grade) for i in range(3) for letter, grade in (("p", 2), ("r", 1))
    ]
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{text}")
    assert prepare.main(["beir", f"--source={folder}", f"--out={folder}/beir"]) == 0
    capsys.readouterr()

    bindings = (
        f"CorpusConfig.passages={folder}/beir/passages.jsonl",
        f"CorpusConfig.store={folder}/beir_store",
        "RetrieveConfig.task=ranking",
        f"RetrieveConfig.file={folder}/beir/test.jsonl",
        f"RetrieveConfig.output={folder}/found.jsonl",
        "RetrieveConfig.k=12",
    )
    assert retrieve.main(flags(gin_file, *bindings)) == 0
    scores = json.loads(capsys.readouterr().out)
    gains, found_shares = [], []
    for row in read_lines(folder / "found.jsonl"):
        ids = [passage["id"] for passage in row["passages"]]
        dcg = sum(
            row["qrels"].get(found, 0) / math.log2(rank + 2) for rank, found in enumerate(ids[:10])
        )
        gains.append(dcg / (2 + 1 / math.log2(3)))
        found_shares.append(len({*ids} & {*row["qrels"]}) / 2)
    assert scores["ndcg@10"] == pytest.approx(np.mean(gains))
    assert scores["recall@12"] == pytest.approx(np.mean(found_shares))


@pytest.mark.slow
def test_hard_negatives_are_found_and_learnt_against(
    gin_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gin_file.parent
    bindings = (
        f"RetrieveConfig.file={folder}/train.jsonl",
        f"RetrieveConfig.output={folder}/hard.jsonl",
        "RetrieveConfig.k=8",
        "RetrieveConfig.negatives=3",
    )
    assert retrieve.main(flags(gin_file, *bindings)) == 0
    for row in read_lines(folder / "hard.jsonl"):
        ids = [p["id"] for p in row["passages"] if p["id"] not in row["gold"]]
        assert row["negatives"] == ids[:3]

    training = (
        f"RetrieverTrainConfig.model_dir={folder}/retriever",
        "RetrieverTrainConfig.total_steps=2",
        "RetrieverTrainConfig.batch_size=8",
        "RetrieverTrainConfig.log_every=1",
        "RetrieverTrainConfig.task=qa",
        f"RetrieverTrainConfig.file={folder}/twice.jsonl",
        "ContrastiveConfig.queue_size=0",
        "ContrastiveConfig.momentum=0.0",
        "ContrastiveConfig.in_batch=True",
    )
    found = read_lines(folder / "hard.jsonl")
    both = [{**row, "id": f"{row['id']}-{copy}"} for copy in range(2) for row in found]
    write_lines(folder / "twice.jsonl", both)
    losses = []
    for number in (0, 2):
        name = f"RetrieverTrainConfig.model_dir={folder}/with_{number}"
        hard = f"RetrieverTrainConfig.hard_negatives={number}"
        assert train_retriever.main(flags(gin_file, *training, name, hard)) == 0
        losses.append([row["train/loss"] for row in read_metrics(folder / f"with_{number}")])
    assert losses[1][0] > losses[0][0]  # the same batch against more

    capsys.readouterr()
    write_lines(folder / "twice.jsonl", [{**row, "negatives": []} for row in both])
    hard = "RetrieverTrainConfig.hard_negatives=1"
    assert train_retriever.main(flags(gin_file, *training, hard)) == 2
    assert "has no field 'negatives', from which" in capsys.readouterr().err
