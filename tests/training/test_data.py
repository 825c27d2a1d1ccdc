"""Batches: shapes, truncation, padding, given passages, and an order that resumes."""

import itertools
import json
import threading
import types
from concurrent import futures

import jax
import numpy as np
import pytest

from atlas_jax.answering.batcher import Batcher, DataConfig
from atlas_jax.core import meeting
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.shortening import Shorten
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.models.assembly import Tokenizers
from atlas_jax.tasks.base import Choice, Example
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.training.data import training_batches

CONFIG = DataConfig(batch_size=4, query_length=80, retriever_query_length=40, target_length=24)


@pytest.fixture(scope="module")
def tokenizers(reader_tokenizer_file, retriever_tokenizer_file):
    return Tokenizers(
        Tokenizer.from_file(reader_tokenizer_file), Tokenizer.from_file(retriever_tokenizer_file)
    )


@pytest.fixture
def store(passages_file, tokenizers, tmp_path):
    formats = StoreConfig(reader_length=24, retriever_length=24)
    folder = tmp_path / "store"
    return PassageStore.build(
        passages_file, folder, tokenizers.reader, tokenizers.retriever, formats, progress=False
    )


def _example(number=0, **fields):
    texts = {
        "query_text": f"question: who is {number}? answer: <extra_id_0>",
        "retriever_text": f"who is {number}?",
        "target_text": f"<extra_id_0> number {number}",
    }
    return Example(id=f"q{number}", **{**texts, **fields})


def _same(one, two):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def _qa_records(tmp_path, count):
    path = tmp_path / "qa.jsonl"
    rows = [{"id": f"q{i}", "question": f"q {i}?", "answers": [f"a{i}", "b"]} for i in range(count)]
    write_jsonl(path, rows)
    return QATask().load(path)


def test_a_batch_holds_the_tokens_of_its_texts(tokenizers):
    batch = Batcher(tokenizers, CONFIG)([_example(1), _example(2)])
    reader, retriever = tokenizers.reader, tokenizers.retriever
    assert batch.query_tokens_bq.shape == (2, 80)
    assert batch.retriever_tokens_br.shape == (2, 40)
    assert batch.target_tokens_bt.shape == (2, 24)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch)} == {"int32", "float32"}
    query = reader.encode("question: who is 2? answer: <extra_id_0>", add_special=False)
    target = reader.encode("<extra_id_0> number 2", add_special=True)
    asked = retriever.encode("who is 2?", add_special=True)
    for row, ids in (
        (batch.query_tokens_bq[1], query),
        (batch.target_tokens_bt[1], target),
        (batch.retriever_tokens_br[1], asked),
    ):
        assert row[: len(ids)].tolist() == ids
        assert not row[len(ids) :].any()
    assert batch.excluded_rows_bx.tolist() == [[-1], [-1]]
    assert batch.weight_b.tolist() == [1, 1]
    assert batch.given is None


def test_texts_that_are_too_long_keep_what_matters(tokenizers):
    config = DataConfig(query_length=10, retriever_query_length=6, target_length=5)
    batch = Batcher(tokenizers, config)([_example(7)])
    reader, retriever = tokenizers.reader, tokenizers.retriever
    query = reader.encode(_example(7).query_text, add_special=False)
    assert batch.query_tokens_bq[0].tolist() == query[-10:]
    assert batch.query_tokens_bq[0, -1] == reader.sentinel_id(0)
    target = reader.encode(_example(7).target_text, add_special=True)
    assert batch.target_tokens_bt[0].tolist() == [*target[:4], reader.eos_id]
    asked = retriever.encode(_example(7).retriever_text, add_special=True)
    kept = batch.retriever_tokens_br[0]
    assert kept.tolist() == [retriever.cls_id, *asked[-5:]]
    right = DataConfig(query_length=10, truncate_query="right")
    assert Batcher(tokenizers, right)([_example(7)]).query_tokens_bq[0].tolist() == query[:10]


def test_the_retriever_can_get_the_readers_query_as_it_is_cut(tokenizers):
    """Without a text of its own it embeds the whole query, shortened where the reader's is."""
    text = "question: one two three four five six answer: <extra_id_0>"
    start, end = text.index("one"), text.index(" answer")
    whole = _example(query_text=text, retriever_text="")
    assert whole.retriever_text == text
    cut = _example(query_text=text, retriever_text="", shorten=(Shorten(start, end, 8),))
    batch = Batcher(tokenizers, CONFIG)([whole, cut])
    kept = tokenizers.reader.last_tokens(text[start:end], 8)
    assert kept != text[start:end]
    for row, asked in ((0, text), (1, f"question: {kept} answer: <extra_id_0>")):
        ids = tokenizers.retriever.encode(asked, add_special=True)
        assert batch.retriever_tokens_br[row, : len(ids)].tolist() == ids
        assert not batch.retriever_tokens_br[row, len(ids) :].any()


def test_missing_rows_weigh_nothing(tokenizers):
    batcher = Batcher(tokenizers, CONFIG)
    full = batcher([_example(1), _example(2)])
    padded = batcher([_example(1), _example(2)], rows=4)
    assert _same(jax.tree.map(lambda leaf: leaf[:2], padded), full)
    assert padded.weight_b.tolist() == [1, 1, 0, 0]
    assert not padded.target_tokens_bt[2:].any()
    assert padded.retriever_tokens_br[2:].any(axis=1).all(), "every row has something to embed"
    with pytest.raises(ValueError, match="3 examples for a batch of 2 rows"):
        batcher([_example(i) for i in range(3)], rows=2)
    with pytest.raises(ValueError, match="0 examples"):
        batcher([])


def test_excluded_ids_become_rows(tokenizers, store):
    batcher = Batcher(tokenizers, DataConfig(max_excluded=2), store)
    examples = [
        _example(1, excluded_ids=("bera-1",)),
        _example(2),
        _example(3, excluded_ids=("elsewhere", "coro-2")),
    ]
    assert batcher(examples).excluded_rows_bx.tolist() == [[2, -1], [-1, -1], [-1, 5]]
    with pytest.raises(UserError, match="record 'q4' excludes 3 passages"):
        batcher([_example(4, excluded_ids=("a", "b", "c"))])


def test_given_passages_are_tokenised_as_the_store_does_it(tokenizers, store):
    passages = tuple(store.passage(row) for row in range(6))
    batcher = Batcher(tokenizers, CONFIG, given_passages=4, formats=store.config)
    examples = [
        _example(1, given_passages=passages[:2]),
        _example(2, given_passages=passages),
        _example(3, given_passages=()),
    ]
    given = batcher(examples, rows=4).given
    assert given.rows_bk.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [-1] * 4, [0, 1, -1, -1]]
    assert np.array_equal(given.mask_bk, given.rows_bk >= 0)
    assert np.array_equal(np.isneginf(given.scores_bk), ~given.mask_bk)
    assert np.array_equal(given.reader_tokens_bkl[1], store.reader_tokens_nl[:4])
    assert np.array_equal(given.retriever_tokens_bkm[1], store.retriever_tokens_nm[:4])
    assert not given.reader_tokens_bkl[0, 2:].any()
    assert given.reader_tokens_bkl.shape == (4, 4, 24)
    with pytest.raises(UserError, match="record 'q5' has no field 'passages'"):
        batcher([_example(5)])


def test_every_record_comes_once_an_epoch_in_a_new_order(tokenizers, tmp_path):
    records = _qa_records(tmp_path, 10)
    stream = training_batches(QATask(), records, list, 5, seed=1)
    epochs = [[e.id for e in next(stream) + next(stream)] for _ in range(4)]
    assert all(sorted(epoch) == sorted(record.id for record in records) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = training_batches(QATask(), records, list, 5, seed=2)
    assert [e.id for e in next(other) + next(other)] != epochs[0]


def test_a_resumed_stream_goes_on_as_it_would_have(tokenizers, passages_file):
    task = MLMTask(min_words=5)
    records = task.load(passages_file)

    def stream():
        return training_batches(task, records, Batcher(tokenizers, CONFIG), 4, seed=3)

    whole = list(itertools.islice(stream(), 9))
    first = stream()
    for batch in whole[:4]:
        assert _same(next(first), batch)
    state = json.loads(json.dumps(first.get_state()))
    resumed = stream()
    resumed.set_state(state)
    for batch in whole[4:]:
        assert _same(next(resumed), batch)
    # The same passage is masked differently in another epoch.
    assert len({batch.query_tokens_bq.tobytes() for batch in whole}) == 9


def test_batches_may_hold_a_single_example(tokenizers, tmp_path):
    records = _qa_records(tmp_path, 3)
    ones = training_batches(QATask(), records, list, 1, seed=0)
    threes = training_batches(QATask(), records, list, 3, seed=0)
    for _ in range(4):
        assert [next(ones)[0], next(ones)[0], next(ones)[0]] == next(threes)


def test_processes_share_the_examples_of_one(tokenizers, tmp_path):
    records = _qa_records(tmp_path, 7)
    task = QATask()
    whole = training_batches(task, records, list, 6, seed=0)
    parts = [training_batches(task, records, list, 6, 0, rows) for rows in ([0, 1, 4], [2, 3, 5])]
    for _ in range(5):
        expected = next(whole)
        assert next(parts[0]) == [expected[row] for row in (0, 1, 4)]
        assert next(parts[1]) == [expected[row] for row in (2, 3, 5)]


def test_the_task_is_told_the_step(passages_file):
    task = MLMTask(min_words=5, filter_self_after=2)
    stream = training_batches(task, task.load(passages_file), list, 4, seed=0)
    filtered = [[bool(example.excluded_ids) for example in next(stream)] for _ in range(4)]
    assert filtered == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]


def test_errors_while_making_batches_reach_the_reader_of_the_stream(tokenizers, tmp_path):
    records = _qa_records(tmp_path, 4)
    batcher = Batcher(tokenizers, CONFIG, given_passages=2)
    with pytest.raises(UserError, match="has no field 'passages'"):
        next(training_batches(QATask(), records, batcher, 4, seed=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataConfig(batch_size=0),
            "DataConfig.batch_size = 0: expected a whole number",
        ),
        (lambda: DataConfig(target_length=-1), "DataConfig.target_length = -1"),
        (lambda: DataConfig(truncate_query="middle"), "DataConfig.truncate_query = 'middle'"),
        (lambda: training_batches(QATask(), [], list, 4, seed=-1), "the seed is -1"),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_reader_with_another_end_token_is_refused(tokenizers):
    with pytest.raises(UserError, match="must have 1"):
        Batcher(Tokenizers(tokenizers.retriever, tokenizers.retriever), CONFIG)


def _choices(*texts):
    return tuple(Choice(text, f"<extra_id_0> {text}") for text in texts)


def test_choices_are_weighted_tokens(tokenizers):
    few, more = _choices("yes", "no"), _choices("a", "b", "c")
    examples = [
        _example(choices=few),
        _example(1, choices=more, choice_score="first_token"),
    ]
    made = Batcher(tokenizers, CONFIG, choices=3, length_penalty=0.5)(examples).choices
    assert made.tokens_bct.shape == made.weights_bct.shape == (2, 3, 24)
    yes = tokenizers.reader.encode("<extra_id_0> yes", add_special=True)
    assert made.tokens_bct[0, 0, : len(yes)].tolist() == yes
    np.testing.assert_allclose(made.weights_bct[0, 0, : len(yes)], len(yes) ** -0.5, rtol=1e-6)
    assert not made.weights_bct[0, 0, len(yes) :].any() and not made.tokens_bct[0, 2].any()
    # Byte level: sentinel, blank, letter, end. Only the letter counts.
    assert made.weights_bct[1, :, :4].tolist() == [[0, 0, 1, 0]] * 3


def test_choices_that_begin_alike_cannot_be_told_by_their_first_token(tokenizers):
    alike = _example(choices=_choices("ab", "ac", "b"), choice_score="first_token")
    with pytest.raises(UserError, match="'q0': two choices begin with one token"):
        Batcher(tokenizers, CONFIG, choices=3)([alike])


def test_processes_agree_on_the_example_at_fault(tokenizers, monkeypatch):
    fine, alike = _choices("a", "b", "c"), _choices("ab", "ac", "b")
    told = {number: alike for number in (5, 8)}  # of processes 1 and 0
    examples = [
        _example(n, choices=told.get(n, fine), choice_score="first_token") for n in range(9)
    ]
    batcher, place, values = Batcher(tokenizers, CONFIG, choices=3), threading.local(), {}
    monkeypatch.setattr("atlas_jax.answering.batcher._CHECKED", 2)  # of one process alone
    batcher.check(examples, "x.jsonl")

    class Service:
        def key_value_set(self, key, value, allow_overwrite):
            values[key] = value

        def key_value_dir_get(self, folder):
            return [(key, value) for key, value in list(values.items()) if key.startswith(folder)]

    def check(index):
        place.index = index
        with pytest.raises(UserError) as error:
            batcher.check(examples, "x.jsonl")
        return str(error.value)

    monkeypatch.setattr(meeting, "joined", lambda: (place.index, 2))
    monkeypatch.setattr(meeting, "_NUMBERS", itertools.repeat(0))
    client = types.SimpleNamespace(client=Service())
    monkeypatch.setattr(meeting, "distributed", types.SimpleNamespace(global_state=client))
    with futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(check, (0, 1))
    assert first == second
    assert first.startswith("x.jsonl: record 'q5': two choices begin with one token")


def test_all_records_of_a_file_have_choices_or_none(tokenizers):
    with pytest.raises(UserError, match="record 'q1' has 0 choices; all records of a file"):
        Batcher(tokenizers, CONFIG, choices=2)([_example(choices=_choices("a", "b")), _example(1)])


def test_a_long_question_is_cut_and_its_options_stay(tokenizers):
    def query(length, most):
        before, after = "question: ", " options: (A) x (B) y answer: <extra_id_0>"
        text = before + "abcdefghij" * (length // 10) + after
        cut = Shorten(len(before), len(before) + length, most)
        made = Batcher(tokenizers, CONFIG)([_example(query_text=text, shorten=(cut,))])
        kept = tokenizers.reader.decode(made.query_tokens_bq[0], skip_special=False)
        kept = kept.replace("<pad>", "")
        assert kept.startswith(before) and kept.endswith(after)
        return kept[len(before) : -len(after)]

    assert query(10, 20) == "abcdefghij"
    assert query(30, 13) == "hijabcdefghij"
    assert query(100, 100) == ("abcdefghij" * 10)[-39:]  # what query_length = 80 leaves
    with pytest.raises(UserError, match="'q0': what has to stay whole of its query takes more"):
        text = "a" + "b" * 100
        Batcher(tokenizers, CONFIG)([_example(query_text=text, shorten=(Shorten(0, 1, 1),))])


def test_a_prompt_becomes_tokens_where_its_length_is_given(tokenizers):
    example = _example(prompt_text="who")
    with pytest.raises(UserError, match="DataConfig.prompt_length = 0: bind it"):
        Batcher(tokenizers, CONFIG)([example])
    prompted = DataConfig(query_length=80, retriever_query_length=40, prompt_length=5)
    made = Batcher(tokenizers, prompted)([example, _example(1)])
    who = tokenizers.reader.encode("who", add_special=False)
    assert made.prompt_tokens_bp.tolist() == [[*who, 0, 0], [0] * 5]


def test_prompt_and_target_can_be_tokenised_as_one_text(tokenizers):
    """A prompt of n tokens is then the first n of both together; the rest is the target."""
    reader = tokenizers.reader
    example = _example(prompt_text="The capital<extra_", target_text="id_0>is")
    bare = _example(1, prompt_text="")
    lengths = {"query_length": 80, "retriever_query_length": 40, "prompt_length": 24}
    apart = Batcher(tokenizers, DataConfig(**lengths, target_length=24))([example, bare])
    together = DataConfig(**lengths, target_length=24, prompt_and_target="together")
    joined = Batcher(tokenizers, together)([example, bare])
    prompt = reader.encode("The capital<extra_", add_special=False)
    whole = reader.encode("The capital<extra_id_0>is", add_special=True)
    n = min(len(prompt), len(whole))
    assert whole[:n] != prompt, "the two meet within one token"
    assert joined.taught_prompt_bp[0, :n].tolist() == whole[:n]
    assert not joined.taught_prompt_bp[0, n:].any()
    assert joined.target_tokens_bt[0, : len(whole) - n].tolist() == whole[n:]
    assert joined.prompt_tokens_bp.tolist() == apart.prompt_tokens_bp.tolist(), "to generate from"
    assert joined.target_tokens_bt[1].tolist() == apart.target_tokens_bt[1].tolist()
    assert apart.joined_prompt_bp is None and apart.taught_prompt_bp is apart.prompt_tokens_bp
    with pytest.raises(UserError, match="DataConfig.prompt_and_target = 'joined'"):
        DataConfig(prompt_and_target="joined")
