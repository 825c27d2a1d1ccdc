"""Pretraining on a task's queries with their gold passages: pairs, groups, resuming, refusals."""

import json
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from atlas_jax import from_gin, train_retriever
from atlas_jax.answering.batcher import DataConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.corpus.config import CorpusSpec
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.models.config import ModelSpec
from atlas_jax.training.config import RetrieverTrainConfig
from atlas_jax.training.metrics import read_metrics
from atlas_jax.training.query_pairs import Share, query_pairs
from atlas_jax.training.run import RetrieverRun
from tests.training.runs import CAPITALS, COUNTRIES, read_lines, write_lines

FORMATS = StoreConfig(reader_length=48, retriever_length=48)
GIN = """
RetrieverConfig.vocab_size = 144
RetrieverConfig.hidden_dim = 16
RetrieverConfig.num_layers = 1
RetrieverConfig.num_heads = 2
RetrieverConfig.mlp_dim = 32
RetrieverConfig.max_positions = 64
RetrieverTrainConfig.task = 'cloze'
RetrieverTrainConfig.batch_size = 8
RetrieverTrainConfig.group = 2
RetrieverTrainConfig.log_every = 1
CheckpointConfig.every = 2
ClozeTask.noise = 0.5
ContrastiveConfig.queue_size = 0
ContrastiveConfig.momentum = 0.0
ContrastiveConfig.in_batch = True
DataConfig.retriever_query_length = 48
StoreConfig.reader_length = 48
StoreConfig.retriever_length = 48
retriever/OptimizerConfig.learning_rate = 1e-3
retriever/OptimizerConfig.total_steps = 50
"""


def write_facts(path: Path) -> Path:
    """Two passages of facts a country, with prose in between that has none."""
    rows: list[dict[str, Any]] = []
    for country, capital in zip(COUNTRIES, CAPITALS, strict=True):
        fields = {"p": f"Capital: name: {capital}.", "x": "It is small.", "r": "Languages: Arvic."}
        rows += [{"id": f"{k}-{country}", "title": country, "text": t} for k, t in fields.items()]
    return write_lines(path, rows)


class Corpus:
    """A store of the facts, both tokenizers, and pairs from them."""

    def __init__(self, folder: Path, tokenizers: Tokenizers) -> None:
        self.file = write_facts(folder / "facts.jsonl")
        self.tokenizers = tokenizers
        self.store = PassageStore.build(
            self.file, folder / "store", tokenizers.reader, tokenizers.retriever, FORMATS,
            progress=False,
        )  # fmt: skip

    def pairs(self, share: Share | None = None, **settings: Any) -> Any:
        fields = {"task": "cloze", "file": str(self.file), "batch_size": 8, **settings}
        config = RetrieverTrainConfig(model_dir="run", total_steps=1, **fields)
        data = from_gin.told(DataConfig)
        task = from_gin.task(config.task)
        told = RetrieverRun(
            train=config, models=ModelSpec(), corpus=CorpusSpec(), task=task, data=data
        )
        return query_pairs(self.store, self.tokenizers, told, share or Share.whole(config))

    def texts(self, batch: tuple[np.ndarray, np.ndarray]) -> list[tuple[str, str]]:
        """Of each pair, the query and the passage's id."""
        tokens_bl, rows = batch
        queries = [self.tokenizers.retriever.decode(row.tolist()) for row in tokens_bl]
        return list(zip(queries, [self.store.passage(int(r))["id"] for r in rows], strict=True))


@pytest.fixture
def corpus(tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path) -> Corpus:
    files = (reader_tokenizer_file, retriever_tokenizer_file)
    return Corpus(tmp_path, Tokenizers(*map(Tokenizer.from_file, files)))


def test_a_query_meets_its_own_passage(corpus: Corpus) -> None:
    batches = corpus.pairs()
    seen = set()
    for _ in range(2):
        for query, passage_id in corpus.texts(next(batches)):
            kind, country = passage_id.split("-")
            label = {"p": "capital name", "r": "languages"}[kind]
            assert query.replace(" ", "") == f"{country} {label}".lower().replace(" ", "")
            seen.add(passage_id)
    assert len(seen) == 16, "an epoch holds every passage with a fact once"


def test_groups_stay_together_and_are_shuffled(corpus: Corpus) -> None:
    batches = corpus.pairs(group=2)
    firsts = []
    for _ in range(6):
        ids = [passage_id for _, passage_id in corpus.texts(next(batches))]
        assert all(
            a[1:] == b[1:] and a[0] + b[0] == "pr" for a, b in zip(ids[::2], ids[1::2], strict=True)
        )
        firsts.append(ids[::2])
    epochs = [firsts[i] + firsts[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    whole = corpus.pairs(group=8)
    assert {len({country for _, country in corpus.texts(next(whole))}) for _ in range(3)} == {8}


def test_pairs_depend_on_seed_and_place_alone(corpus: Corpus) -> None:
    gin.parse_config("ClozeTask.noise = 1.0")
    batches = corpus.pairs(group=2, seed=5)
    first = [corpus.texts(next(batches)) for _ in range(2)]
    state = json.loads(json.dumps(batches.get_state()))
    rest = [corpus.texts(next(batches)) for _ in range(3)]
    again = corpus.pairs(group=2, seed=5)
    again.set_state(state)
    assert [corpus.texts(next(again)) for _ in range(3)] == rest
    assert corpus.texts(next(corpus.pairs(group=2, seed=5))) == first[0]
    assert corpus.texts(next(corpus.pairs(group=2, seed=6))) != first[0]
    queries = [dict((b, a) for a, b in batch) for batch in (*first, *rest)]
    assert len({query["p-Arvo"] for query in queries if "p-Arvo" in query}) > 1, "wording varies"


def test_processes_make_what_their_devices_hold(corpus: Corpus, tmp_path: Path) -> None:
    rows = read_lines(corpus.file)
    asked = [
        {"id": f"q{i}", "question": f"who is {row['title']}?", "answers": ["x"],
         "gold": [row["id"]], "negatives": [rows[i - 1]["id"], rows[i - 2]["id"], rows[0]["id"]]}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    told = {"task": "qa", "file": str(write_lines(tmp_path / "qa.jsonl", asked)), "group": 2}
    whole = corpus.pairs(**told, hard_negatives=2)
    shares = [Share(range(first, first + 4), range(3 * first, 3 * first + 12)) for first in (0, 4)]
    parts = [corpus.pairs(share, **told, hard_negatives=2) for share in shares]
    for _ in range(4):
        queries, passages = next(whole)
        for share, part in zip(shares, parts, strict=True):
            own_queries, own_passages = next(part)
            np.testing.assert_array_equal(own_queries, queries[share.queries])
            np.testing.assert_array_equal(own_passages, passages[share.passages])
    assert queries.shape[0] == 8 and passages.shape == (24,)


def test_a_long_query_is_cut_as_everywhere_else(corpus: Corpus) -> None:
    gin.parse_config("DataConfig.retriever_query_length = 5")
    whole = corpus.texts(next(corpus.pairs()))
    gin.parse_config("DataConfig.truncate_query = 'right'")
    head = corpus.texts(next(corpus.pairs()))
    assert all(a != b for (a, _), (b, _) in zip(whole, head, strict=True))
    assert {query[-1] for query, passage_id in whole if passage_id[0] == "r"} == {"s"}


def test_records_without_a_gold_passage_are_named(corpus: Corpus, tmp_path: Path) -> None:
    asked = [{"id": f"q{i}", "question": "who?", "answers": ["x"]} for i in range(2)]
    file = write_lines(tmp_path / "qa.jsonl", asked)
    with pytest.raises(UserError, match=r"qa.jsonl: record 'q[01]' names no gold .*task = 'qa'"):
        next(corpus.pairs(task="qa", file=str(file), batch_size=2))
    gold = [{**row, "gold": [i]} for row, i in zip(asked, ("p-Arvo", "nowhere"), strict=True)]
    file = write_lines(tmp_path / "gold.jsonl", gold)
    with pytest.raises(UserError, match="store has no passage with the id 'nowhere'"):
        next(corpus.pairs(task="qa", file=str(file), batch_size=2))
    file = write_lines(tmp_path / "one.jsonl", gold[:1])
    assert corpus.texts(next(corpus.pairs(task="qa", file=str(file), batch_size=1))) == [
        ("who?", "p-Arvo")
    ]


def test_what_cannot_be_paired_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    for settings, message in (
        ({"group": 3}, "RetrieverTrainConfig.group = 3: expected a divisor of .*batch_size = 8"),
        ({"group": 0}, "RetrieverTrainConfig.group = 0: expected a whole number, 1 or more"),
        ({"file": ""}, "RetrieverTrainConfig.file = '': expected given with a task"),
        ({"batch_size": 32}, r"batch_size = 32 is more than the 16 records of \S*facts.jsonl"),
        ({"file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"task": "clozee"}, "no task is called 'clozee'; did you mean cloze"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            corpus.pairs(**settings)


@pytest.mark.slow
def test_an_interrupted_run_repeats_the_whole_one(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    facts = write_facts(tmp_path / "facts.jsonl")
    paths = {
        "ModelConfig.reader_tokenizer": reader_tokenizer_file,
        "ModelConfig.retriever_tokenizer": retriever_tokenizer_file,
        "CorpusConfig.passages": facts,
        "CorpusConfig.store": tmp_path / "store",
        "RetrieverTrainConfig.file": facts,
    }
    gin_file = tmp_path / "run.gin"
    gin_file.write_text(GIN + "".join(f"{name} = '{path}'\n" for name, path in paths.items()))

    def run(name: str, steps: int) -> None:
        where = f"--gin.RetrieverTrainConfig.model_dir='{tmp_path / name}'"
        until = f"--gin.RetrieverTrainConfig.total_steps={steps}"
        assert train_retriever.main([f"--gin_file={gin_file}", where, until]) == 0

    run("whole", 5)
    run("parts", 3)
    run("parts", 5)
    names = [tmp_path / name for name in ("whole", "parts")]
    weights = [(name / "final" / "retriever.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1]
    losses = [[row["train/loss"] for row in read_metrics(name)] for name in names]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert PassageStore.open(tmp_path / "store").count == 24
