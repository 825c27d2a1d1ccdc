"""Vocabularies of T5 and BERT against the libraries they come from."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import read_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.interop.vocabularies import find_tokenizer, from_sentencepiece, from_wordpiece
from tests.goldens import make_sentencepiece_goldens as goldens
from tests.interop import small

ROWS = json.loads(goldens.EXPECTED.read_text("utf-8"))
SHARED = Path(os.environ.get("ATLAS_SHARED", Path(__file__).parents[3] / "shared"))
FACTBOOK = SHARED / "data" / "factbook" / "passages_2026.jsonl.gz"


def reader_tokenizer() -> Tokenizer:
    text = find_tokenizer(goldens.MODEL, "reader")
    assert text is not None
    return Tokenizer(text)


TOKENIZER = reader_tokenizer()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row["text"][:20]))
def test_the_ids_are_those_of_sentencepiece(row: dict[str, object]) -> None:
    assert TOKENIZER.encode(str(row["text"]), False) == row["ids"]


def test_special_ids_and_sentinels() -> None:
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.unk_id) == (0, 1, 2)
    assert TOKENIZER.vocab_size == 340 + 100
    # The last id is <extra_id_0>, as in every T5: 32099 behind 32,000 pieces.
    assert [TOKENIZER.sentinel_id(n) for n in (0, 1, 99)] == [439, 438, 340]
    ids = TOKENIZER.encode("born <extra_id_0> free", True)
    assert ids.count(439) == 1 and ids[-1] == 1
    assert TOKENIZER.decode(ids) == "born free"


def test_sentinels_that_the_model_has_stay_where_they_are(tmp_path: Path) -> None:
    """mT5's way: <extra_id_N> among the pieces."""
    extra = b"\x0a" + bytes([19]) + b"\x0a\x0c<extra_id_0>\x15\0\0\0\0"
    raw = goldens.MODEL.read_bytes()
    path = tmp_path / "spiece.model"
    path.write_bytes(raw + extra)
    tokenizer = Tokenizer(from_sentencepiece(path))
    assert tokenizer.sentinel_id(0) == 340
    assert tokenizer.sentinel_id(99) == 341  # the other 99 behind it
    assert tokenizer.sentinel_id(1) == 439
    assert tokenizer.vocab_size == 440


@pytest.mark.parametrize("form", ["spiece.model", "tokenizer.json"])
def test_the_sentinels_of_a_whole_t5(form: str, tmp_path: Path) -> None:
    """1.0, 1.1, LM-adapted and Flan share one vocabulary: 32,000 pieces, ids up to 32099."""
    have = 340  # pieces of the small model
    raw = goldens.MODEL.read_bytes()
    for number in range(have, 32000):
        piece = f"filler{number}".encode()
        inner = b"\x0a" + bytes([len(piece)]) + piece + b"\x15\0\0\xc8\xc2"
        raw += b"\x0a" + bytes([len(inner)]) + inner
    path = tmp_path / "spiece.model"
    path.write_bytes(raw)
    if form == "tokenizer.json":  # as transformers writes it: the sentinels are in it
        text = from_sentencepiece(path)
        path = tmp_path / form
        path.write_text(text)
    found = find_tokenizer(path, "reader")
    assert found is not None
    tokenizer = Tokenizer(found)
    assert tokenizer.vocab_size == 32100
    assert [tokenizer.sentinel_id(n) for n in (0, 1, 99)] == [32099, 32098, 32000]
    assert tokenizer.encode("born <extra_id_0> free", True).count(32099) == 1


def test_sentinels_of_mt5_lose_the_mark_of_a_blank(tmp_path: Path) -> None:
    raw = goldens.MODEL.read_bytes()
    for number in (2, 1, 0):
        piece = f"▁<extra_id_{number}>".encode()
        inner = b"\x0a" + bytes([len(piece)]) + piece + b"\x15\0\0\0\0"
        raw += b"\x0a" + bytes([len(inner)]) + inner
    path = tmp_path / "spiece.model"
    path.write_bytes(raw)
    tokenizer = Tokenizer(from_sentencepiece(path, sentinels=3))
    assert [tokenizer.sentinel_id(n) for n in (0, 1, 2)] == [342, 341, 340]
    assert tokenizer.vocab_size == 343
    assert tokenizer.encode("born <extra_id_1>", False)[-1] == 341


def test_sentinels_in_another_order_are_refused(tmp_path: Path) -> None:
    path = small.reader_tokenizer(tmp_path)
    text = path.read_text()
    swapped = text.replace("<extra_id_3>", "@").replace("<extra_id_4>", "<extra_id_3>")
    path.write_text(swapped.replace("@", "<extra_id_4>"))
    with pytest.raises(UserError, match="<extra_id_3> has the id .* 3 below that of <extra_id_0>"):
        find_tokenizer(path, "reader")


def joined(query: str, passage: str) -> None:
    apart = TOKENIZER.encode(query, False) + TOKENIZER.encode(passage, False)
    assert apart == TOKENIZER.encode(f"{query} {passage}", False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_joined_texts_give_joined_tokens(data: st.DataObject) -> None:
    """Real text in twelve scripts and languages, cut and put together at any blanks."""
    words = [word for text in goldens.DECLARATION.values() for word in text.split()]
    words += ["<extra_id_0>", "answer:", "title:", "context:"]
    some = st.lists(st.sampled_from(words), min_size=1, max_size=8).map(" ".join)
    joined(data.draw(some), data.draw(some))


# Not marks: a blank with an accent on it is one character.
TYPED = st.text(st.characters(categories=["Lu", "Ll", "Nd", "Po", "Zs"]), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(TYPED, TYPED)
def test_any_letters_joined_by_a_blank(query: str, passage: str) -> None:
    joined(query, passage)


@pytest.mark.skipif(not FACTBOOK.exists(), reason=f"no {FACTBOOK}; set ATLAS_SHARED")
def test_joined_texts_of_the_factbook() -> None:
    for number, (_, record) in enumerate(read_jsonl(FACTBOOK)):
        if number % 50 == 0:
            joined("question: where is it? answer: <extra_id_0>",
                   f"title: {record['title']} context: {record['text']}")  # fmt: skip


def test_a_tokenizer_that_does_not_split_at_blanks_is_refused(tmp_path: Path) -> None:
    content = json.loads(small.reader_tokenizer(tmp_path).read_text())
    content["pre_tokenizer"]["prepend_scheme"] = "first"
    content["normalizer"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**content, "pre_tokenizer": None}))
    with pytest.raises(UserError, match="give other tokens joined by a blank than apart"):
        find_tokenizer(path, "reader")


def test_a_hard_coded_truncation_is_overridden(tmp_path: Path) -> None:
    """As all-MiniLM-L6-v2 has it: 128 tokens, padded to 128."""
    content = json.loads(from_wordpiece(small.wordpiece_file(tmp_path)))
    content["truncation"] = {
        "max_length": 128, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    text = find_tokenizer(path, "retriever")
    assert text is not None
    written = json.loads(text)
    assert written["truncation"] is None and written["padding"] is None
    tokenizer = Tokenizer(text)
    assert len(tokenizer.encode("a " * 300, True)) == 302
    assert len(tokenizer.encode("a", True)) == 3


def test_wordpiece_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer(from_wordpiece(small.wordpiece_file(tmp_path)))
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.eos_id) == (0, 1, 2, 3)
    # Lower case, accents off; a letter after the first is a ## piece.
    assert tokenizer.encode("Éa b", True) == [2, 9, 31, 6, 3]
    assert tokenizer.encode("a9", True) == [2, 1, 3]
    cased = Tokenizer(from_wordpiece(small.wordpiece_file(tmp_path), lower_case=False))
    assert cased.encode("A a", True) == [2, 1, 5, 3]


def test_what_a_folder_holds_is_found(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path, "retriever") is None
    small.wordpiece_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    text = find_tokenizer(tmp_path, "retriever")
    assert text is not None and Tokenizer(text).encode("A", True) == [2, 1, 3]


@pytest.mark.parametrize("told", [True, False, None])
def test_lower_case_is_that_of_the_tokenizers_config(told: bool | None, tmp_path: Path) -> None:
    vocabulary = small.wordpiece_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text(from_wordpiece(vocabulary, lower_case=False))
    if told is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": told}))
    text = find_tokenizer(tmp_path, "retriever")
    assert text is not None
    assert Tokenizer(text).lowercases is (told is True)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.9999])
def test_a_truncated_sentencepiece_model_is_refused(share: float, tmp_path: Path) -> None:
    raw = goldens.MODEL.read_bytes()
    path = tmp_path / "spiece.model"
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=f"{path}: not a whole sentencepiece model"):
        from_sentencepiece(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(b"\x0a\x03\x0a\x01a" * 5)  # pieces, but not T5's
    with pytest.raises(UserError, match="a T5's model with '<pad>', '</s>'"):
        from_sentencepiece(path)
    path.write_bytes(b"\x0a\x03\x0a\x01a" * 5 + b"\x12\x02\x18\x02")  # model_type 2: BPE
    with pytest.raises(UserError, match="not a plain unigram model"):
        from_sentencepiece(path)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\na\na\n")
    with pytest.raises(UserError, match="the piece 'a' occurs twice"):
        from_wordpiece(vocab)
    vocab.write_text("[PAD]\na\nb\n")
    with pytest.raises(UserError, match=r"no \[UNK\], \[CLS\], \[SEP\]"):
        from_wordpiece(vocab)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json file"):
        find_tokenizer(tmp_path, "reader")


@pytest.mark.parity
def test_live_against_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")
    pytest.importorskip("torch", reason="needs the extra [parity]")
    theirs = transformers.BertTokenizerFast(vocab=str(small.wordpiece_file(tmp_path)))
    ours = Tokenizer(from_wordpiece(tmp_path / "vocab.txt"))
    for text in goldens.texts():
        assert ours.encode(text, True) == theirs(text)["input_ids"], text


@pytest.mark.parity
def test_live_against_sentencepiece() -> None:
    library = pytest.importorskip("sentencepiece", reason="needs the extra [parity]")
    processor = library.SentencePieceProcessor(model_file=str(goldens.MODEL))
    for row in ROWS:
        assert processor.encode(row["text"]) == row["ids"]
