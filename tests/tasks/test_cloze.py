"""Task `cloze`: queries, exchanged values and distractors agree with the passages given."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from atlas_jax import from_gin
from atlas_jax.answering.batcher import Batcher, DataConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.tasks.base import Example, Prediction
from atlas_jax.tasks.cloze import ClozeRecord, ClozeTask
from atlas_jax.tasks.facts import find_facts
from atlas_jax.training.data import training_batches

NAMES = "Arvo Bera Coro Dela Emin Fasa".split()
CITIES = "Lindel Tomund Essin Parva Quorl Rivat".split()


def corpus() -> list[dict[str, Any]]:
    """Three passages a country; two of them say something about its capital."""
    rows = []
    for number, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
        texts = {
            "a": f"Capital: name: {city} (a city); time: UTC+{number}. Area: total: {number}2 "
            f"sq km (2023 est.); land: {number}1 sq km; water: 1{number} sq km. Climate: mild.",
            "b": f"Capital: name: Old {city}; etymology: from the river {name}. Exports: goods: "
            f"wine {number}; partners: Hila {number}%.",
            "c": f"Population: total: {number}5,000; growth: 1.{number}%. "
            f"Languages: {name}ic, Arvic.",
        }
        rows += [
            {"id": f"{name}-{key}", "title": name, "section": key.upper(), "text": text}
            for key, text in texts.items()
        ]
    return rows


def load(tmp_path: Path, task: ClozeTask, rows: Sequence[dict[str, Any]]) -> list[ClozeRecord]:
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, rows)
    return task.load(path)


def draw(task: ClozeTask, records: Sequence[ClozeRecord], times: int = 20) -> list[Example]:
    return [
        task.example(record, np.random.default_rng([turn, number]))
        for turn in range(times)
        for number, record in enumerate(records)
    ]


def targets(example: Example) -> list[str]:
    """The values, in the order of their sentinels."""
    found = re.findall(r"<extra_id_(\d+)> (.*?)(?= <extra_id_|$)", example.target_text)
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [value for _, value in found]


def asked_passage(example: Example) -> dict[str, Any]:
    assert example.given_passages is not None
    [own] = [p for p in example.given_passages if p["id"] == example.id]
    return dict(own)


def labels(text: str) -> set[str]:
    return {fact.label for fact in find_facts(text)}


GIVEN = {
    "plain": ClozeTask(given_passages=3),
    "several": ClozeTask(given_passages=3, max_facts=3, exchange=0.5),
    "all exchanged": ClozeTask(given_passages=2, max_facts=2, exchange=1.0),
    "windows": ClozeTask(given_passages=3, max_facts=3, exchange=0.8, window_words=6, noise=0.5),
}


def test_what_is_drawn_is_what_the_texts_have(tmp_path: Path) -> None:
    records = load(tmp_path, ClozeTask(), corpus())
    made = records[0].corpus
    sources = list(made.sources)
    assert [record.source for record in records[1:3]] == sources[1:3]
    assert list(made.titles) == NAMES
    assert list(made.of_title("Bera")) == [3, 4, 5]
    assert made.has_title("Bera") and not made.has_title("Nowhere")
    words = [word for source in sources for word in source.text.split()[::7]]
    assert list(made.words) == words
    assert list(made.small_words) == [word for word in words if word.isalpha() and word.islower()]
    each = (word for source in sources for word in source.text.split() if word.isalpha())
    assert list(made.vocabulary) == list(dict.fromkeys(each))
    facts = [(n, fact) for n, source in enumerate(sources) for fact in source.facts]
    for label in {fact.label for _, fact in facts}:
        same = [(n, fact) for n, fact in facts if fact.label == label]
        assert list(made.of_label(label)) == [n for n, _ in same]
        assert list(made.facts(label)) == [(fact, sources[n].text) for n, fact in same]


def test_a_record_becomes_text(tmp_path: Path) -> None:
    text = "Capital: name: Lindel (a city)."
    row = {"id": "arvo", "title": "Arvo", "section": "S", "text": text, "code": "ar"}
    [record] = load(tmp_path, ClozeTask(), [row])
    assert ClozeTask().example(record) == Example(
        id="arvo",
        query_text="question: Arvo Capital name answer: <extra_id_0>",
        retriever_text="Arvo Capital name",
        target_text="<extra_id_0> Lindel",
        answers=("Lindel",),
        gold_ids=("arvo",),
        meta={"title": "Arvo", "code": "ar"},
    )
    gin.parse_config("ClozeTask.ask_format = '{sentinel} is {label}'\nClozeTask.given_passages = 2")
    example = from_gin.task("cloze").example(record)
    assert example.query_text == "question: Arvo <extra_id_0> is Capital name"
    given = {"id": "arvo", "title": "Arvo", "section": "S", "text": text}
    assert example.given_passages == (given,), "there is no other passage to give"


def test_several_facts_have_a_sentinel_each(tmp_path: Path) -> None:
    task = ClozeTask(max_facts=3)
    records = load(tmp_path, task, corpus())
    counts = []
    for example in draw(task, records):
        found = re.findall(r"(\S+(?: \S+)*?) answer: <extra_id_(\d+)>", example.query_text)
        values = targets(example)
        counts.append(len(values))
        assert [int(number) for _, number in found] == list(range(len(values)))
        assert example.answers == (" ".join(values),)
        source = next(r.source for r in records if r.source.passage.id == example.id)
        by_label = {fact.label: fact.value(source.text) for fact in source.facts}
        asked = [label.removeprefix(f"question: {source.title} ") for label, _ in found]
        assert [by_label[label] for label in asked] == values
        assert len(set(asked)) == len(asked)
        assert example.retriever_text == f"{source.title} {asked[0]}"
    assert {1, 2, 3} == set(counts) and abs(counts.count(1) - counts.count(2)) < 60


@pytest.mark.parametrize("name", GIVEN)
def test_the_same_rng_gives_the_same_text(tmp_path: Path, name: str) -> None:
    task = GIVEN[name]
    records = load(tmp_path, task, corpus())
    assert draw(task, records, 2) == draw(task, load(tmp_path, task, corpus()), 2)
    assert task.example(records[0]) == task.example(records[0])
    one, other = (task.example(records[0], np.random.default_rng(seed)) for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("name", GIVEN)
def test_targets_stand_in_the_asked_passage_behind_their_label(tmp_path: Path, name: str) -> None:
    task = GIVEN[name]
    for example in draw(task, load(tmp_path, task, corpus())):
        own = asked_passage(example)
        assert own["title"] == example.meta["title"]
        assert own["title"] in example.query_text and own["title"] in example.retriever_text
        for value in targets(example):
            assert f": {value}" in own["text"]
        assert len(example.given_passages or ()) == task.given_passages


def test_exchanged_values_are_those_of_the_passage(tmp_path: Path) -> None:
    """Whatever was exchanged, reading the given passage gives the target."""
    task = ClozeTask(given_passages=1, max_facts=3, exchange=0.7)
    records = load(tmp_path, task, corpus())
    changed = renamed = 0
    for example in draw(task, records, 30):
        own = asked_passage(example)
        source = next(r.source for r in records if r.source.passage.id == example.id)
        values = {fact.label: fact.value(source.text) for fact in source.facts}
        pieces = re.split("|".join(map(re.escape, values.values())), source.text)
        frame = "(.+?)".join(map(re.escape, pieces))
        assert re.fullmatch(frame, own["text"]), "all but the values stays"
        asked = example.query_text.removeprefix(f"question: {own['title']} ")
        found = re.split(r" answer: <extra_id_\d>(?: |$)", asked)[:-1]
        for label, value in zip(found, targets(example), strict=True):
            assert f"{label.split()[-1]}: {value}" in own["text"]
            changed += value != values[label]
        renamed += own["title"] != source.title
    total = 30 * len(records)
    assert 0.45 * total < changed < 2 * 0.7 * total
    assert 0.2 * total < renamed < 0.4 * total
    kept = ClozeTask(given_passages=1, max_facts=3)
    texts = {row["id"]: row["text"] for row in corpus()}
    assert all(asked_passage(e)["text"] == texts[e.id] for e in draw(kept, records, 3))


@pytest.mark.parametrize("name", GIVEN)
def test_no_distractor_answers_the_query(tmp_path: Path, name: str) -> None:
    task = GIVEN[name]
    quiet = ClozeTask(**{**vars(task), "noise": 0.0})
    records = load(tmp_path, quiet, corpus())
    whole = {row["id"]: labels(row["text"]) for row in corpus()}
    same_title = same_label = 0
    for example in draw(quiet, records, 30):
        title = asked_passage(example)["title"]
        asked = re.split(r" answer: <extra_id_\d>(?: |$)", example.query_text)[:-1]
        asked[0] = asked[0].removeprefix(f"question: {title} ")
        given = example.given_passages or ()
        assert len({passage["id"] for passage in given}) == len(given)
        for passage in given:
            if passage["id"] == example.id:
                assert set(asked) <= whole[example.id]
            elif passage["title"] == title:
                assert whole[passage["id"]].isdisjoint(asked)
                same_title += 1
            else:
                same_label += not whole[passage["id"]].isdisjoint(asked)
    assert same_title > 50 and same_label > 50, "near ones are there"


def test_a_title_that_is_exchanged_for_anothers_has_no_second_answer(tmp_path: Path) -> None:
    """Both passages have the label: once the asked one takes the other's title, they clash."""
    rows = [{"id": name, "title": name, "text": f"Capital: {name}la."} for name in NAMES[:2]]
    task = ClozeTask(given_passages=2, exchange=1.0)
    for example in draw(task, load(tmp_path, task, rows), 100):
        titles = [passage["title"] for passage in example.given_passages or ()]
        assert len(set(titles)) == len(titles)


def test_labels_with_long_or_repeated_values_are_answers_too(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "title": "Arvo", "text": "Capital: Lindel."},
        {"id": "b", "title": "Arvo", "text": "Capital: one two three four. Area: 5."},
        {"id": "c", "title": "Arvo", "text": "Capital: x; Capital: y; Area: 6."},
    ]
    task = ClozeTask(given_passages=3, max_value_words=2)
    records = load(tmp_path, task, rows)
    assert [len(record.source.facts) for record in records] == [1, 1, 1]
    assert [p["id"] for p in task.example(records[0]).given_passages or ()] == ["a"]


def test_the_place_of_the_asked_passage_says_nothing(tmp_path: Path) -> None:
    task = ClozeTask(given_passages=3)
    examples = draw(task, load(tmp_path, task, corpus()), 30)
    places = [[p["id"] for p in e.given_passages or ()].index(e.id) for e in examples]
    assert all(0.25 < places.count(place) / len(places) < 0.42 for place in range(3))


def test_windows_hold_the_asked_facts_and_few_others(tmp_path: Path) -> None:
    whole, task = ClozeTask(given_passages=1), ClozeTask(given_passages=1, window_words=8)
    records = load(tmp_path, task, corpus())
    texts = {row["id"]: row["text"] for row in corpus()}
    windows = [(e, asked_passage(e)["text"]) for e in draw(task, records)]
    for example, text in windows:
        source = texts[example.id]
        assert text in source
        assert text.endswith(tuple(fact.value(source) for fact in find_facts(source)))
        assert targets(example)[0] in text
    lengths = [len(text.split()) for _, text in windows]
    assert max(lengths) <= 14 and 5 < sum(lengths) / len(lengths) < 10
    assert {text for _, text in windows} - set(texts.values())
    assert all(asked_passage(e)["text"] == texts[e.id] for e in draw(whole, records, 1))


def test_noise_disturbs_the_wording_alone(tmp_path: Path) -> None:
    task = ClozeTask(noise=1.0)
    records = load(tmp_path, task, corpus())
    words = {word for record in records for word in record.source.text.split()}
    quiet = {e.retriever_text for e in draw(ClozeTask(), records)}
    examples = draw(task, records)
    for example in examples:
        source = next(r.source for r in records if r.source.passage.id == example.id)
        own = {word for fact in source.facts for word in fact.label.split()}
        signed = {source.title + sign for sign in ("", "?", ".", ",", "'s")}
        for text in (example.query_text, example.retriever_text):
            assert len(signed & set(text.split())) == 1
        assert set(example.retriever_text.split()) <= words | own | signed
        asked = example.query_text.removeprefix("question: ").split()
        assert set(asked) <= words | own | signed | {"answer:", "<extra_id_0>"}
        assert example.query_text.endswith(" answer: <extra_id_0>")
        assert targets(example)[0] in {fact.value(source.text) for fact in source.facts}
    assert sum(e.retriever_text in quiet for e in examples) < 0.2 * len(examples)


def test_the_passage_itself_can_be_kept_out(tmp_path: Path) -> None:
    [record] = load(tmp_path, ClozeTask(), corpus()[:1])
    assert ClozeTask().example(record).excluded_ids == ()
    late = ClozeTask(filter_self=True, filter_self_after=10)
    found = [late.example(record, step=step).excluded_ids for step in (9, 10)]
    assert found == [(), ("Arvo-a",)]
    assert late.example(record).gold_ids == ("Arvo-a",)


def test_a_record_is_shown_and_compared_without_its_whole_file(tmp_path: Path) -> None:
    first, again = (load(tmp_path, ClozeTask(), corpus()) for _ in range(2))
    assert list(first) == list(again) and first[0] != first[1]
    assert len(repr(first[0])) < 3000 and "Fasa" not in repr(first[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_facts": 0}, "ClozeTask.max_facts = 0: expected 1 or more"),
        ({"max_value_words": 0}, "ClozeTask.max_value_words = 0: expected 1 or more"),
        ({"given_passages": -1}, "ClozeTask.given_passages = -1: expected 0 or more"),
        ({"window_words": -5}, "ClozeTask.window_words = -5: expected 0 or more"),
        ({"noise": 1.5}, "ClozeTask.noise = 1.5: expected 0 to 1"),
        ({"exchange": -0.1}, "ClozeTask.exchange = -0.1: expected 0 to 1"),
        ({"exchange": 0.5}, "ClozeTask.exchange = 0.5 .* ClozeTask.given_passages = 0"),
        ({"window_words": 9}, "ClozeTask.window_words = 9 .* ClozeTask.given_passages = 0"),
        ({"query_format": "{question}"}, "ClozeTask.query_format.* no field {question}"),
        ({"ask_format": "{label} {value}"}, "ClozeTask.ask_format.* no field {value}"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClozeTask(**settings)


def test_a_file_without_facts_is_named(tmp_path: Path) -> None:
    prose = {"id": "p", "title": "T", "text": "The river Sann lies in the north."}
    with pytest.raises(UserError, match=r"passages.jsonl: no passage has a fact, 'Field: value'"):
        load(tmp_path, ClozeTask(), [prose])
    long = {**prose, "text": "Area: one two three"}
    with pytest.raises(UserError, match=r"at most 2 words \(ClozeTask.max_value_words\)"):
        load(tmp_path, ClozeTask(max_value_words=2), [long])
    assert len(load(tmp_path, ClozeTask(), [prose, {**long, "id": "q"}])) == 1
    for missing in ("id", "title", "text"):
        with pytest.raises(UserError, match=rf"passages.jsonl:1: .*{missing}"):
            load(tmp_path, ClozeTask(), [{k: v for k, v in long.items() if k != missing}])


def test_batches_hold_the_given_passages(
    tmp_path: Path, reader_tokenizer_file: Path, retriever_tokenizer_file: Path
) -> None:
    tokenizers = Tokenizers(
        Tokenizer.from_file(reader_tokenizer_file), Tokenizer.from_file(retriever_tokenizer_file)
    )
    task = ClozeTask(given_passages=2, exchange=0.8, max_facts=2, window_words=10, noise=0.3)
    records = load(tmp_path, task, corpus())
    config = DataConfig(query_length=160, retriever_query_length=100, target_length=64)
    formats = StoreConfig(reader_length=256, retriever_length=256)
    batcher = Batcher(tokenizers, config, given_passages=2, formats=formats)

    def stream() -> Any:
        return training_batches(task, records, batcher, batch_size=6, seed=1)

    batches = stream()
    first = next(batches)
    state = batches.get_state()
    second = next(batches)
    decode = tokenizers.reader.decode
    for batch in (first, second):
        assert batch.given.mask_bk.all() and batch.given.reader_tokens_bkl.shape == (6, 2, 256)
        for row in range(6):
            query = decode(batch.query_tokens_bq[row].tolist(), skip_special=False)
            passages = [decode(tokens.tolist()) for tokens in batch.given.reader_tokens_bkl[row]]
            target = decode(batch.target_tokens_bt[row].tolist(), skip_special=False)
            values = re.findall(r"<extra_id_\d> ?(.*?) ?(?=<extra_id_|</s>)", target)
            assert values and query.count("<extra_id_") == len(values)
            assert any(all(value in passage for value in values) for passage in passages)
    resumed = stream()
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed).query_tokens_bq, second.query_tokens_bq)


def test_values_are_scored_as_answers(tmp_path: Path) -> None:
    records = load(tmp_path, ClozeTask(), corpus()[:2])
    examples = [ClozeTask().example(record) for record in records]
    found = [
        Prediction(examples[0], examples[0].answers[0], corpus()[:1]),
        Prediction(examples[1], "something else", corpus()[:1]),
    ]
    scores = ClozeTask().evaluate(found, recall_at=(1,))
    assert scores["exact_match"] == 0.5 and scores["recall@1"] == 0.5
