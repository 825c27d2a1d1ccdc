"""Rows of pretraining: chunks, NSP's and SOP's pairs, and their order."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.interop.vocabularies import find_tokenizer
from atlas_jax.training.encoder_texts import (
    Documents,
    RowMaker,
    cut_chunks,
    encoder_batches,
    read_documents,
)
from tests.interop.small import wordpiece_file

FIRST, LAST, LENGTH = 2, 3, 24


def documents(number: int = 40, sentences: int = 6, size: int = 5) -> Documents:
    """Every token says its document: ids of document n are 100 n + 10 and the following."""
    tokens = [100 * n + 10 + i for n in range(1, number + 1) for i in range(sentences * size)]
    return Documents(
        np.asarray(tokens, np.int32),
        np.arange(0, len(tokens) + 1, size),
        np.arange(0, number * sentences + 1, sentences),
    )


def maker(pairs: str, least: int = 1, short: float = 0.0) -> RowMaker:
    texts = documents()
    chunks = cut_chunks(texts, LENGTH - 3, short, 0, least)
    return RowMaker(texts, chunks, LENGTH, pairs, FIRST, LAST)


def parts(tokens: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a row, after checks of what stands around them."""
    real = tokens != 0
    assert tokens[0] == FIRST
    assert tokens[real][-1] == LAST
    assert (types[~real] == 0).all()
    first = tokens[real & (types == 0)]
    second = tokens[real & (types == 1)]
    assert first[-1] == second[-1] == LAST
    return first[1:-1], second[:-1]


def test_chunks_are_consecutive_and_nothing_is_lost() -> None:
    texts = documents()
    chunks = cut_chunks(texts, 21, 0.0, 0)
    spans = [range(start, end) for _, start, end in chunks]
    assert sorted(s for span in spans for s in span) == list(range(240))
    assert all(texts.first[d] <= a < b <= texts.first[d + 1] for d, a, b in chunks)
    short = cut_chunks(texts, 21, 0.5, 0)
    assert len(short) > len(chunks)
    assert sorted(s for _, a, b in short for s in range(a, b)) == list(range(240))


@pytest.mark.parametrize("pairs", ["nsp", "sop"])
def test_half_of_each_label(pairs: str) -> None:
    made = maker(pairs, 2)
    labels = [made.row(i % len(made.chunks), np.random.default_rng(i))[2] for i in range(3000)]
    assert abs(np.mean(labels) - 0.5) < 0.03


def test_a_swapped_pair_holds_the_tokens_of_its_chunk_and_one_in_order_is_in_order() -> None:
    made, seen = maker("sop", 2), Counter[int]()
    for i in range(400):
        number = i % len(made.chunks)
        tokens, types, label = made.row(number, np.random.default_rng(i))
        first, second = parts(tokens, types)
        if label:
            first, second = second, first
        whole = made.documents.between(*made.chunks[number][1:])
        both = np.concatenate([first, second])
        assert (np.diff(both) > 0).all()
        assert set(both) <= set(whole.tolist())
        if len(whole) <= LENGTH - 3:
            assert both.tolist() == whole.tolist()
        seen[label] += 1
    assert min(seen.values()) > 100


def test_b_of_label_1_is_from_another_document() -> None:
    made = maker("nsp")
    for i in range(400):
        document, *_ = made.chunks[i % len(made.chunks)]
        tokens, types, label = made.row(i % len(made.chunks), np.random.default_rng(i))
        first, second = parts(tokens, types)
        assert set(first // 100) == {document + 1}
        assert len(set(second // 100)) == 1
        assert (second[0] // 100 != document + 1) == bool(label)
        assert len(first) + len(second) <= LENGTH - 3
        if not label:
            assert second[0] > first[-1]


def test_a_chunk_of_one_sentence_is_left_out_of_sop_or_paired_as_released() -> None:
    texts = documents(sentences=1, size=5)
    assert len(cut_chunks(texts, 21, 0.0, 0, 2)) == 0
    made = RowMaker(texts, cut_chunks(texts, 21, 0.0, 0), LENGTH, "sop", FIRST, LAST)
    tokens, types, label = made.row(0, np.random.default_rng(0))
    first, second = parts(tokens, types)
    assert label == 1
    assert first[0] // 100 != second[0] // 100


def test_a_row_depends_on_its_place_alone() -> None:
    made = maker("nsp", short=0.2)
    one, two = encoder_batches(made, 4, 7), encoder_batches(made, 4, 7)
    first = [next(one) for _ in range(3)]
    state = one.get_state()
    fourth = next(one)
    two.set_state(state)
    np.testing.assert_array_equal(next(two).tokens_bl, fourth.tokens_bl)
    half = encoder_batches(made, 4, 7, rows=[2, 3])
    np.testing.assert_array_equal(next(half).tokens_bl, first[0].tokens_bl[2:])
    assert (fourth.tokens_bl != first[0].tokens_bl).any()


def test_passages_become_sentences_of_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(find_tokenizer(wordpiece_file(tmp_path), "encoder") or "")
    rows = [
        {"id": "1", "title": "t", "text": "Ab cd. Ef gh! Ij"},
        {"id": "2", "title": "t", "text": "Kl."},
        {"id": "3", "title": "u", "text": "Mn op."},
    ]
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = read_documents(str(path), tokenizer, 100, False)
    assert apart.first.tolist() == [0, 3, 4, 5]
    joined = read_documents(str(path), tokenizer, 100, True)
    assert joined.first.tolist() == [0, 4, 5]
    assert tokenizer.decode(joined.between(0, 4)).replace(" ", "") == "abcdefghijkl"
    cut = read_documents(str(path), tokenizer, 3, False)
    assert np.diff(cut.ends).max() == 3
    starts = tokenizer.word_starts()
    assert starts[tokenizer.encode("ab c", False)].tolist() == [True, False, True]
    path.write_text(json.dumps({"id": "1", "title": "", "text": "\u200b"}) + "\n")
    with pytest.raises(UserError, match="passage"):
        read_documents(str(path), tokenizer, 100, False)
