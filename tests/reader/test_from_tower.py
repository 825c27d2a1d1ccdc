"""A pair encoder begins as the tower that it was given, tokens and all."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax.core import meta

from atlas_jax.core.errors import UserError
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.encoders.bert import BertEncoder
from atlas_jax.reader import fid
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.reader.t5 import T5
from tests.reader.small import PAIR, random_params

WORDS = ("the", "capital", "of", "aru", "##ba", "is", "?", ":", "answer", "question")


def bert_tokenizer(first_unused: int = 1) -> Tokenizer:
    """WordPiece with BERT's special tokens at BERT's ids, and a few words."""
    vocab = {"[PAD]": 0}
    for i in range(99):
        vocab[f"[unused{i}]"] = first_unused + i
    for token in ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused99]", *WORDS):
        vocab[token] = len(vocab)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[t], "content": t, "special": True, **plain} for t in special
        ],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]}
                               for t in ("[CLS]", "[SEP]")},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocab,
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }  # fmt: skip
    return Tokenizer(json.dumps(content))


def random_tower(config: ReaderConfig) -> Any:
    """Parameters of the retriever's tower that such a reader begins as."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(BertEncoder(config.tower).init, jax.random.key(0), np.ones((1, 3), int))
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        meta.unbox(shapes["params"]),
    )


def test_the_reader_has_sentinels_and_an_end_token_where_bert_has_others() -> None:
    theirs = bert_tokenizer()
    ours = reader_tokenizer(theirs)
    assert (ours.eos_id, ours.cls_id, ours.sentinel_id(0), ours.sentinel_id(99)) == (
        1,
        101,
        103,
        104,
    )
    assert ours.vocab_size == theirs.vocab_size
    ids = ours.encode("question: the Capital of Aruba answer: <extra_id_0>", add_special=True)
    assert ids[-2:] == [103, 1]
    assert ids[:-2] == theirs.encode("question: the capital of aruba answer:", False)
    assert ours.decode(ids) == "question : the capital of aruba answer :"


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="unused0"):
        reader_tokenizer(bert_tokenizer(first_unused=2))


def test_the_lower_layers_compute_what_the_tower_computes() -> None:
    config = dataclasses.replace(PAIR, num_encoder_layers=2, pointer=False, pointer_ends=False)
    theirs = random_tower(config)
    passage = np.array([[110, 111, 104, 0]])
    texts = np.array([[101, 110, 111, 104, 102, 0]])  # [CLS] text [SEP]
    expected = BertEncoder(config.tower).apply({"params": theirs}, texts)
    reader = T5(config)
    ours = start_from_tower(random_params(reader), theirs, config, end_id=102)
    found = fid.encode_apart(reader, ours, passage, 6)
    np.testing.assert_allclose(found[0, :5], expected[0, :5], rtol=1e-4, atol=1e-5)
    assert ours["decoder"] is not None and set(ours) == {"decoder", "encoder", "token_embedder"}


def test_a_tower_of_another_width_is_refused() -> None:
    table = {"embeddings": {"word_embeddings": {"embedding": np.zeros((10, 4))}}}
    config = ReaderConfig(16, 8, 2, 1, 1, 4, 16)
    with pytest.raises(UserError, match="emb_dim = 4"):
        start_from_tower({}, table, config, 2)
