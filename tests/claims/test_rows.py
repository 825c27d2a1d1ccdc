"""The rows as they are written: consistent, their configurations complete, no data needed."""

import dataclasses
import json
from pathlib import Path

import pytest

from atlas_jax import from_gin
from atlas_jax.answering.leaks import LeakConfig
from atlas_jax.claims.bench import Bench
from atlas_jax.claims.data import Data
from atlas_jax.claims.pairs import MINI as MINI_PAIR
from atlas_jax.claims.pairs import NANO as NANO_PAIR
from atlas_jax.claims.rows import GROUPS, PRETEXTS, selected
from atlas_jax.claims.runner import Runner
from atlas_jax.claims.steps import Keys, arguments
from atlas_jax.core.config import load_gin
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl, write_jsonl
from atlas_jax.corpus.config import CorpusConfig
from atlas_jax.demo import factbook
from atlas_jax.mini import PART
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.tasks.cloze import ClozeTask
from atlas_jax.training.trainer import _check
from tests.nano import NANO

ALL = [(group, row) for group in GROUPS for row in group.rows]


def _fact(number, **fields):
    return {"id": str(number), "relation": "capital", "entity": f"e{number}", **fields}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Every file that a row reads, with the fields that drawing needs."""
    given = tmp_path / "given"
    editions = {f"{field}_{year}": [f"{field} {year}"]
                for field in ("answers", "gold") for year in (2015, 2026)}  # fmt: skip
    facts = [_fact(n, changed=n % 2 == 0, question=f"q{n}?", title=f"T{n % 150}",
                   answers=[f"answer {n}"], text=f"text with answer {n}", **editions)
             for n in range(200)]  # fmt: skip
    labels = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
    claims = [_fact(n, label=labels[n % 3]) for n in range(90)]
    for part in ("train", "test"):
        write_jsonl(given / f"factbook/temporal_{part}.jsonl.gz", facts)
        write_jsonl(given / f"factbook/claims_{part}.jsonl", claims)
        write_jsonl(given / f"factbook/choice_{part}.jsonl", facts)
        ranked = [_fact(n, bm25_rank=1 + n % 8) for n in range(200)]
        write_jsonl(given / f"squad_open/{part}.jsonl", ranked)
    for name in ("factbook/passages_2015", "factbook/passages_2026", "squad_open/passages"):
        texts = [{"id": f"{name}-{n}", "title": f"T{n}"} for n in (0, 1, 1000)]
        write_jsonl(given / f"{name}.jsonl", texts)

    def prepare(directory, progress=True):
        for name in ("passages", "passages_pretraining", "test"):
            write_jsonl(directory / f"{name}.jsonl", facts)
        for seed in factbook.FEW_SHOT_SEEDS:
            write_jsonl(directory / factbook.few_shot_name(seed), facts[seed : seed + 64])

    monkeypatch.setattr(factbook, "prepare", prepare)
    return Data(tmp_path / "made", given, 50)


def _rows(path):
    return [row for _, row in read_jsonl(path)]


@pytest.mark.parametrize("pair", [NANO_PAIR, MINI_PAIR], ids=lambda pair: pair.recipe.name)
def test_every_row_has_a_complete_configuration_of_its_own_for_each_seed(pair, data, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    bench, keys = Bench(data, tmp_path / "model", pair), Keys()
    of_row = {}
    for group, row in ALL:
        found = [keys.of(row.step(bench, seed)) for seed in (0, 1)]
        assert found[0] != found[1], (group.name, row.name)
        of_row[group.name, row.name] = found[0]
    # What several groups show is run once, all else is told apart.
    shared = of_row["retrieval", "Factbook · retrieval"]
    assert of_row["losses", "pdist"] == of_row["pretext", "none"] == shared
    losses = {key for (group, _), key in of_row.items() if group == "losses"}
    assert len(losses) == 5
    depths = [key for (group, _), key in of_row.items() if group == "k"]
    assert len(set(depths)) == 5
    # Two answers are read from one run: 2 x (2 indices + closed book) runs for 12 rows.
    editions = [key for (group, _), key in of_row.items() if group == "editions"]
    assert (len(editions), len(set(editions))) == (12, 6)


def test_claims_compare_rows_of_their_group():
    for group in GROUPS:
        names = [row.name for row in group.rows]
        assert len(set(names)) == len(names)
        for claim in group.claims:
            assert claim.row in names and claim.against in names and claim.row != claim.against


def test_a_row_reads_only_what_it_says(tmp_path):
    """Rows without `needs` do with what the package brings."""
    bench = Bench(Data(tmp_path, None, 10), tmp_path, NANO_PAIR)
    assert {row.needs for _, row in ALL} == {"", "factbook", "squad_open"}
    for group, row in ALL:
        if row.needs:
            with pytest.raises(UserError, match="--data"):
                row.step(bench, 0)
            assert not bench.data.has(row.needs), group.name


def test_only_takes_groups_and_rows_and_names_the_nearest():
    assert {group.name for group, _ in selected(GROUPS, "losses, k")} == {"losses", "k"}
    assert [row.name for _, row in selected(GROUPS, "losses/adist")] == ["adist"]
    assert selected(GROUPS, "") == ALL
    with pytest.raises(UserError, match="did you mean losses"):
        selected(GROUPS, "loses")


def test_draws_are_as_large_as_asked_and_repeat_themselves(data, tmp_path):
    test = data.of("factbook/temporal_test.jsonl")
    sample = _rows(data.sample(test, changed=True))
    assert len(sample) == 50 and all(row["changed"] for row in sample)
    again = Data(tmp_path / "again", data.given, 50)
    assert _rows(again.sample(test, changed=True)) == sample

    claims = data.of("factbook/claims_train.jsonl")
    few, more = (_rows(data.labelled(claims, count, 0)) for count in (15, 64))
    assert more[:15] == few and len({json.dumps(row) for row in more}) == 64
    counts = sorted(sum(row["label"] == one for row in more) for one in {r["label"] for r in more})
    assert counts == [21, 21, 22]
    assert _rows(data.labelled(claims, 15, 1)) != few
    with pytest.raises(UserError, match="too few rows"):
        data.labelled(claims, 100, 0)

    found = _rows(data.findable(data.of("squad_open/train.jsonl"), 0))
    assert len(found) == 64 and all(row["bm25_rank"] <= 5 for row in found)
    with pytest.raises(UserError, match="nothing.jsonl"):
        data.of("factbook/nothing.jsonl")


def test_an_editions_lesson_has_its_answers_and_no_passage_of_another_country(data):
    train = data.of("factbook/temporal_train.jsonl")
    lesson = _rows(data.of_edition(data.few_shot(train, 0), "2015"))
    assert len(lesson) == 64
    assert all(set(row) == {"question", "answers", "gold"} for row in lesson)
    assert lesson[0]["answers"] == ["answers 2015"] and lesson[0]["gold"] == ["gold 2015"]
    passages = _rows(data.about(data.of("factbook/passages_2015.jsonl"), train))
    assert [row["title"] for row in passages] == ["T0", "T1"]


def _config(pair):
    """What the pair's model folder says of itself."""
    if pair is NANO_PAIR:
        return json.loads((NANO / "config.json").read_text())
    config = json.loads((PART / "config.json").read_text())
    retriever = dataclasses.asdict(RetrieverConfig(vocab_size=30522, max_positions=512))
    models = {**config["models"], "retriever": retriever}
    return {**config, "models": models, "bases": {}}


def _put_config(models, pair):
    """Let the folders say how their models read; earlier steps would have written them."""
    for folder in filter(None, {models.reader, models.retriever}):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(_config(pair)))


@pytest.mark.parametrize("pair", [NANO_PAIR, MINI_PAIR], ids=lambda pair: pair.recipe.name)
def test_every_configuration_is_one_that_its_entry_point_takes(pair, data, tmp_path):
    """What contradicts itself would show only once its turn comes, after an hour of others."""
    bench, runner = Bench(data, tmp_path, pair), Runner(tmp_path / "runs")
    lesson = f"runs/{pair.recipe.lesson}.gin"
    steps = {}
    for _, row in ALL:
        for step in runner.missing([row.step(bench, 0)]):
            steps[runner.keys.of(step)] = step
    for step in steps.values():
        flags = arguments(step, runner.folder)
        files = [flag.removeprefix("--gin_file=") for flag in flags if "gin_file" in flag]
        load_gin(files, [f.removeprefix("--gin.") for f in flags if f.startswith("--gin.")])
        if step.command == "remove_leaks":
            assert from_gin.told(LeakConfig).ngram in (4, 8)
            continue
        if step.command == "build_index":
            config = from_gin.told(CorpusConfig)
            assert config.store and config.index and config.passages
            continue
        _put_config(from_gin.models().config, pair)
        told = from_gin.train_run()
        _check(told)
        if step.files == (lesson,):
            assert isinstance(told.task, ClozeTask) and told.train.passages == "file"
            assert told.task.question_share >= 0.85 and told.task.question_file
            continue
        assert told.corpus.config.store and told.corpus.config.index
        asked = told.train.passages, told.evaluation.passages
        assert asked in (("index", "index"), ("none", "none"))
        assert (told.task.name, told.eval_task.name) == (told.train.task, told.evaluation.task)
        assert told.task.name in (told.eval_task.name, *PRETEXTS)
        assert told.data.query_length < told.step.reader_length
        distillation = told.distillation
        assert (distillation.loss, distillation.score_temperature) != ("pdist", 0.01)
