"""Tokenizers: made from text, loaded, and joined as ids."""

import json

import numpy as np
import pytest
import tokenizers

from atlas_jax import train_tokenizer
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.datasets.tokenizer_training import (
    READER_FILE,
    RETRIEVER_FILE,
    train_reader_tokenizer,
    train_retriever_tokenizer,
    train_tokenizers,
)

ENGLISH = (
    "Coastline: 14,500 km. Independence: 1 January 1901 (federation of UK colonies). "
    "Exports: $342.036 billion (2020 est.); the country's main partners are China 39%."
)
SCRIPTS = {
    "latin": "Das Fürstentum Liechtenstein ist ein Binnenstaat; dessen Hauptort heißt Vaduz.",
    "vietnamese": "Hà Nội là thủ đô của nước Cộng hòa xã hội chủ nghĩa Việt Nam.",
    "greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας, με 3.041.131 κατοίκους.",
    "cyrillic": "Москва́ — столица России, город федерального значения.",
    "arabic": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها.",
    "hebrew": "יְרוּשָׁלַיִם היא עיר הבירה של מדינת ישראל.",
    "hindi": "नई दिल्ली भारत की राजधानी है।",
    "thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "japanese": "東京は日本の首都である。人口は1400万人。",
    "korean": "서울은 대한민국의 수도이다.",
    "symbols": "5 km² ½ ≥ 3 °C — “quoted” 👩‍👩‍👧 e\u0301 \u00a0non-breaking",
}
TEXTS = [ENGLISH, *SCRIPTS.values()] * 5


@pytest.fixture(scope="module")
def reader() -> Tokenizer:
    return train_reader_tokenizer(TEXTS, 700, num_sentinels=100, min_character_count=10)


@pytest.fixture(scope="module")
def retriever() -> Tokenizer:
    return train_retriever_tokenizer(TEXTS, 800, min_character_count=10)


def test_reader_has_the_layout_of_t5(reader):
    assert (reader.pad_id, reader.eos_id, reader.unk_id, reader.cls_id) == (0, 1, 2, None)
    assert reader.vocab_size == 700
    assert reader.sentinel_id(0) == reader.vocab_size - 1
    assert reader.sentinel_id(99) == reader.vocab_size - 100
    with pytest.raises(UserError, match="no token <extra_id_100>"):
        reader.sentinel_id(100)


def test_a_gap_in_the_ids_counts():
    model = tokenizers.models.WordPiece({"[PAD]": 0, "[SEP]": 1, "[UNK]": 2, "far": 70000})
    assert Tokenizer(tokenizers.Tokenizer(model).to_str()).vocab_size == 70001


def test_special_tokens_are_added_when_asked(reader, retriever):
    plain = reader.encode("the country", add_special=False)
    assert reader.encode("the country", add_special=True) == [*plain, reader.eos_id]
    plain = retriever.encode("the country", add_special=False)
    special = retriever.encode("the country", add_special=True)
    assert special == [retriever.cls_id, *plain, retriever.eos_id]
    assert retriever.pad_id == 0


@pytest.mark.parametrize("second", SCRIPTS)
@pytest.mark.parametrize("first", SCRIPTS)
def test_joining_ids_is_joining_texts(reader, first, second):
    query = f"question: {SCRIPTS[first]} answer: <extra_id_0>"
    passage = f"title: {SCRIPTS[second]} context: {ENGLISH}"
    for left, right in ((query, passage), (passage, SCRIPTS[first])):
        joined = reader.encode(left + " " + right, add_special=False)
        assert reader.encode(left, False) + reader.encode(right, False) == joined


@pytest.mark.parametrize("script", SCRIPTS)
def test_decoding_gives_the_text_and_nothing_is_unknown(reader, retriever, script):
    text = SCRIPTS[script].replace("\u00a0", "").replace("e\u0301", "é").replace("а́", "а\u0301")
    assert reader.decode(reader.encode(text, add_special=True)) == text
    assert retriever.unk_id not in retriever.encode(text, add_special=True)
    assert reader.unk_id not in reader.encode(text, add_special=True)


def test_a_value_has_the_same_tokens_wherever_it_stands(reader):
    value = reader.encode("14,500 km", add_special=False)
    for text in (
        "Coastline: 14,500 km.",
        "Coastline: 14,500 km; and more",
        "Coastline: 14,500 km)",
    ):
        ids = reader.encode(text, add_special=False)
        assert any(ids[i : i + len(value)] == value for i in range(len(ids)))
    assert len(value) - len(reader.encode("km", add_special=False)) == len("14,500")


def test_sentinels_are_one_id_and_leave_their_neighbours_alone(reader):
    first, second = reader.sentinel_id(0), reader.sentinel_id(1)
    the, country = reader.encode("the", False), reader.encode("country", False)
    comma = reader.encode("the,", False)[len(the) :]
    assert reader.encode("the <extra_id_0> country", False) == [*the, first, *country]
    assert reader.encode("the<extra_id_0> country", False) == [*the, first, *country]
    assert reader.encode("the   <extra_id_0>", False) == [*the, first]
    assert reader.encode("<extra_id_0> the <extra_id_1>", False) == [first, *the, second]
    assert reader.encode("the <extra_id_0>, the", False) == [*the, first, *comma, *the]
    assert reader.decode([first, *country, reader.eos_id, 0, 0]) == "country"
    assert reader.decode([first, *country], skip_special=False) == "<extra_id_0> country"


def test_retriever_ignores_case_and_accents(retriever):
    assert retriever.encode("CÔTE D'IVOIRE", True) == retriever.encode("cote d'ivoire", True)
    cased = train_retriever_tokenizer(TEXTS, 800, lowercase=False, min_character_count=10)
    assert cased.encode("Coastline", True) != cased.encode("coastline", True)


def test_batches_equal_single_texts(reader):
    texts = [*SCRIPTS.values(), ""]
    batch = reader.encode_batch(texts, add_special=True)
    assert batch == [reader.encode(text, add_special=True) for text in texts]
    padded = reader.pad_to(batch, 200)
    assert reader.decode_batch(padded) == [reader.decode(ids) for ids in batch]


@pytest.mark.parametrize("kind", ["words", "one word", "long words", "no blanks", "sentinels"])
def test_the_beginning_of_a_long_text_has_its_first_tokens(reader, retriever, kind, monkeypatch):
    text = {
        "words": ENGLISH + " ",
        "one word": "exports",
        "long words": "x" * 150 + " ",  # one unknown token of the retriever's
        "no blanks": SCRIPTS["japanese"],
        "sentinels": "The <extra_id_0> of\n<extra_id_1>, ",
    }[kind] * 4000
    texts = ["Vaduz.", text, text[:100], ""]
    for tokenizer, special in ((reader, False), (retriever, True)):
        whole, read, prepared = tokenizer.encode_batch(texts, special), [], tokenizer._prepared

        def counting(text, read=read, prepared=prepared):
            read.append(len(text))
            return prepared(text)

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "_prepared", counting)
            starts = tokenizer.encode_starts(texts, special, 40)
        assert [row[:40] for row in whole[1:2]] == [row[:40] for row in starts[1:2]]
        assert [whole[0], *whole[2:]] == [starts[0], *starts[2:]]
        assert (len(whole[1]) > 40) == (len(starts[1]) > 40)
        if kind in ("words", "no blanks", "sentinels"):
            assert sum(read) < 5000 < len(text) // 10


def test_padding_and_truncation_keep_the_special_tokens(reader, retriever):
    end, start = retriever.eos_id, retriever.cls_id
    rows = [[start, 10, 11, 12, end], [start, end], []]
    assert retriever.pad_to(rows, 4).tolist() == [
        [start, 10, 11, end],
        [start, end, 0, 0],
        [0, 0, 0, 0],
    ]
    assert retriever.pad_to(rows[:1], 3, truncate="left").tolist() == [[start, 12, end]]
    assert retriever.pad_to(rows[:1], 2).tolist() == [[start, end]]
    assert reader.pad_to([[10, 11, 12, reader.eos_id]], 2).tolist() == [[10, reader.eos_id]]
    assert reader.pad_to([[10, 11, 12]], 2).tolist() == [[10, 11]]
    assert reader.pad_to([[10, 11, 12]], 2, truncate="left").tolist() == [[11, 12]]
    assert reader.pad_to([], 2).shape == (0, 2)
    assert reader.pad_to(rows, 4).dtype == np.int32
    with pytest.raises(UserError, match="length 1 is too short"):
        retriever.pad_to(rows, 1)


def test_training_twice_gives_the_same_files(tmp_path):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [{"id": i, "title": "T", "text": text} for i, text in enumerate(TEXTS)])
    made = [
        train_tokenizers(str(path), str(tmp_path / name), vocab_size=900, retriever_vocab_size=800)
        for name in ("one", "two")
    ]
    for number, name in enumerate((READER_FILE, RETRIEVER_FILE)):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert first == second
        loaded = Tokenizer.from_file(tmp_path / "one" / name)
        assert loaded.content_hash == made[0][number].content_hash
        assert loaded.encode(ENGLISH, True) == made[1][number].encode(ENGLISH, True)


def test_the_hash_ignores_layout_but_not_content(tmp_path, reader):
    path = tmp_path / "tokenizer.json"
    reader.save(path)
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=2))
    same = Tokenizer.from_file(path)
    assert same.content_hash == reader.content_hash
    assert len(same.encode(ENGLISH, True)) > 3
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    assert Tokenizer.from_file(path).content_hash != reader.content_hash


def test_an_unfit_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.json: no such file"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="broken.json: not a tokenizer.json file"):
        Tokenizer.from_file(tmp_path / "broken.json")
    for vocabulary, message in (
        ({"a": 0, "</s>": 1}, "no padding token"),
        ({"<pad>": 0}, "no end token"),
        ({"</s>": 0, "<pad>": 1}, "has id 1, but must have 0"),
    ):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
        with pytest.raises(UserError, match=message):
            Tokenizer(backend.to_str())


def test_training_names_what_is_wrong(tmp_path):
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [{"id": "1", "body": "text"}])
    with pytest.raises(UserError, match="no record has text in any of title, section, text"):
        train_tokenizers(str(path), str(tmp_path / "out"))
    write_jsonl(path, [{"id": "1", "text": 3}])
    with pytest.raises(UserError, match=":1: field 'text' must be a string"):
        train_tokenizers(str(path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="a vocabulary of 150 is too small"):
        train_reader_tokenizer(TEXTS, 250)
    with pytest.raises(UserError, match="num_sentinels is 0"):
        train_reader_tokenizer(TEXTS, 900, num_sentinels=0)


def test_the_entry_point_trains_from_gin(tmp_path, capsys):
    path, out = tmp_path / "passages.jsonl", tmp_path / "out"
    write_jsonl(path, [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    bindings = {"passages_path": f"'{path}'", "out_dir": f"'{out}'", "vocab_size": "700"}
    flags = [f"--gin.train_tokenizers.{name}={value}" for name, value in bindings.items()]
    assert train_tokenizer.main(flags) == 0
    assert "reader_tokenizer.json: 543 ids" in capsys.readouterr().out
    assert train_tokenizer.main(flags[1:]) == 2
    assert "train_tokenizers.passages_path" in capsys.readouterr().err
