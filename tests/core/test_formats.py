"""What is typed is text; a format brings special tokens."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from atlas_jax.core.errors import UserError
from atlas_jax.core.formats import Filled, fill, literal, unmarked
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.store_files import StoreConfig, encode
from atlas_jax.tasks import metrics
from atlas_jax.tasks.base import BaseTask
from atlas_jax.tasks.fever import FeverTask
from atlas_jax.tasks.kilt import KILTTask
from atlas_jax.tasks.lm import LMTask
from atlas_jax.tasks.mlm import MLMTask
from atlas_jax.tasks.multiple_choice import MultipleChoiceTask
from atlas_jax.tasks.qa import QATask
from atlas_jax.tasks.section import SectionTask
from atlas_jax.tasks.temporal import TemporalTask

TYPED = "<pad> </s> <unk> <extra_id_0> <extra_id_1> [SEP] [CLS] [MASK]"
READER_NAMES = ["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"]


def reader(sentinels_special: bool = True, end: bool = True, unknown: bool = True) -> Tokenizer:
    """A unigram model of single characters, as T5's tokenizer is built."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2 if unknown else None))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    backend.decoder = tokenizers.decoders.Metaspace("▁")
    if end:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    for name in READER_NAMES:
        special = sentinels_special or not name.startswith("<extra")
        token = AddedToken(name, special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    return Tokenizer(backend.to_str())


def retriever() -> Tokenizer:
    """A WordPiece model of letters."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "<", ">", "/", "_"]
    pieces += [mark + chr(code) for mark in ("", "##") for code in range(97, 123)]
    pieces += [mark + str(digit) for mark in ("", "##") for digit in range(10)]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(pieces[:5])
    return Tokenizer(backend.to_str())


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (BaseTask(), {"query": TYPED, "target": TYPED, "choices": [TYPED, "b"]}),
        (QATask(), {"question": TYPED, "answers": [TYPED], "choices": [TYPED, "b"]}),
        (FeverTask(), {"claim": TYPED, "label": "SUPPORTS"}),
        (LMTask(min_words=2), {"title": TYPED, "section": TYPED, "text": f"{TYPED} {TYPED}"}),
        (MLMTask(min_words=2), {"title": TYPED, "section": TYPED, "text": f"{TYPED} {TYPED}"}),
        (
            MultipleChoiceTask(prompt_format="{question} {options}"),
            {"question": TYPED, "options": {"A": TYPED, "B": "b"}, "answer": "A"},
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_special_tokens_in_a_record_are_text(task, fields, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "1", **fields}) + "\n")
    plain = tmp_path / "plain.jsonl"
    words = " ".join(f"word{number}" for number in range(8))
    plain.write_text(json.dumps({"id": "1", **fields}).replace(TYPED, words) + "\n")
    example, other = (task.example(task.load(path)[0]) for path in (file, plain))
    texts = ("query_text", "target_text", "prompt_text")
    of_reader = reader()
    for name in texts:
        typed, usual = getattr(example, name), getattr(other, name)
        # As many special tokens as the format brings to ordinary text.
        special = np.isin(of_reader.encode(typed, False), [0, 1, 2, 98, 99]).sum()
        assert special == np.isin(of_reader.encode(usual, False), [0, 1, 2, 98, 99]).sum()
    ids = retriever().encode(example.retriever_text, True)
    assert np.isin(ids, [0, 2, 3, 4]).tolist() == [True, *[False] * (len(ids) - 2), True]


def test_the_tasks_with_files_of_their_own_take_text_as_text():
    for task, name in ((KILTTask(), "input"), (SectionTask(), "section")):
        text = fill(task.query_format, **{"title": TYPED, "section": TYPED, name: TYPED})
        usual = fill(task.query_format, **{"title": "a", "section": "a", name: "a"})
        ids, expected = (np.array(reader().encode(one, False)) for one in (text, usual))
        assert np.isin(ids, [0, 1, 98, 99]).sum() == np.isin(expected, [0, 1, 98, 99]).sum()


def test_a_blank_of_templama_is_the_sentinel_and_no_more(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"question": "A <pad> plays for <extra_id_0>. <extra_id_0>", "changed": True}
    file.write_text(json.dumps({**row, "answers_1": ["a"], "answers_2": ["b"]}) + "\n")
    task = TemporalTask(edition="1", other="2", query_format="{question}")
    ids = reader().encode(task.example(task.load(file)[0]).query_text, False)
    assert ids.count(reader().sentinel_id(0)) == 1
    assert 0 not in ids


def test_special_tokens_in_a_passage_are_text():
    record = {"id": "1", "title": TYPED, "section": "", "text": TYPED}
    tokens_1l = encode([record], "reader", StoreConfig(reader_length=400), reader())
    assert not np.isin(tokens_1l[0][tokens_1l[0] > 0], [1, 2, 98, 99]).any()
    decoded = reader().decode(tokens_1l[0])
    assert decoded == f"title: {TYPED} context: {TYPED}"
    tokens_1m = encode([record], "retriever", StoreConfig(retriever_length=400), retriever())
    kept = tokens_1m[0][tokens_1m[0] > 0]
    assert kept[0] == 2 and kept[-1] == 3
    assert not np.isin(kept[1:-1], [2, 3, 4]).any()


def test_an_answer_of_special_tokens_can_be_right():
    tokenizer = reader()
    answer = tokenizer.decode(tokenizer.encode(fill("<extra_id_0> {answer}", answer=TYPED), True))
    assert answer == TYPED
    assert metrics.exact_match(answer, TYPED) == 1.0


def test_a_format_may_bring_any_special_token():
    ids = retriever().encode(fill("{title} [SEP] {text}", title="a [SEP]", text="b"), True)
    assert ids.count(3) == 2  # the format's and the last one
    assert reader().encode(fill("{text}<b>", text="<i>"), False) == reader().encode("<i><b>", False)


def test_what_a_format_made_is_put_into_another_as_it_is():
    inner = fill("<extra_id_1> {text}", text="<extra_id_0>")
    outer = fill("{inner} <extra_id_0>", inner=inner)
    assert isinstance(outer, Filled)
    assert [i for i in reader().encode(outer, False) if i in (98, 99)] == [98, 99]
    assert unmarked(outer) == "<extra_id_1> <extra_id_0> <extra_id_0>"


def test_ordinary_text_is_not_touched():
    for text in ("What is [this]? 5 < 6 > 4", "<b>", "a", ""):
        assert literal(text) == text
        assert fill("question: {text} answer: <extra_id_0>", text=text) == (
            f"question: {text} answer: <extra_id_0>"
        )


def test_marks_in_a_text_are_left_out():
    assert literal("a\ufdd1<pad>\ufdd0") == "a<pad>"


def test_the_end_of_a_text_with_special_names():
    tokenizer = reader()
    text = literal("ab <extra_id_0> cd <extra_id_1> ef")
    kept = tokenizer.last_tokens(text, 20)
    assert len(tokenizer.encode(kept, False)) in (20, 21)
    assert unmarked("ab <extra_id_0> cd <extra_id_1> ef").endswith(unmarked(kept))


def test_sentinels_that_are_plain_pieces_are_mended_and_told(caplog):
    tokenizer = reader(sentinels_special=False)
    assert "<extra_id_0> and 1 others are plain text in the file" in caplog.text
    ids = tokenizer.encode("<extra_id_0> Tolm", True)
    assert ids == reader().encode("<extra_id_0> Tolm", True)
    assert metrics.exact_match(tokenizer.decode(ids), "Tolm") == 1.0


def test_a_tokenizer_that_puts_no_end_is_mended_and_told(caplog):
    tokenizer = reader(end=False)
    assert "puts no token around a text; </s> is added" in caplog.text
    assert tokenizer.encode("a", True) == reader().encode("a", True)


def test_a_tokenizer_without_its_unknown_token_is_refused():
    with pytest.raises(UserError, match=r"no unknown token \(<unk> or \[UNK\]\)"):
        reader(unknown=False)
    model = models.WordPiece({"[PAD]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]")
    with pytest.raises(UserError, match="no unknown token"):
        Tokenizer(tokenizers.Tokenizer(model).to_str())
    silent = tokenizers.Tokenizer(models.BPE({"[PAD]": 0, "[SEP]": 1, "a": 2}, []))
    with pytest.raises(UserError, match="leaves out the character"):
        Tokenizer(silent.to_str())
