"""Texts are classified at their own lengths, with what their padded form would give."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.models.encoder_folder import load_encoder
from atlas_jax.training import prompted
from atlas_jax.training.classifier_scores import Classifier
from atlas_jax.training.prompted import Texts, asked_by, prompt_texts
from tests.training.classified import TASK, save_tiny


def reading(records: list, texts: Texts, batch_size: int) -> Classifier:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return Classifier(records, texts, batch_size, rows, mesh)


@pytest.mark.parametrize("length", [50, 64])
def test_batches_are_cut_to_their_longest_text_and_keep_the_order(length: int) -> None:
    rng = np.random.default_rng(0)
    lengths_n = np.concatenate([[length, 1, 16, 17], rng.integers(1, 30, 33)])
    tokens_bl = np.where(np.arange(length) < lengths_n[:, None], rng.integers(1, 9, length), 0)
    zeros_n = np.zeros(37, np.int32)
    texts = Texts(tokens_bl.astype(np.int32), np.zeros_like(tokens_bl), zeros_n, zeros_n)
    np.testing.assert_array_equal(texts.lengths(), lengths_n)
    seen = []

    def tokens(_: object, some: Texts) -> jax.Array:
        seen.append(some.tokens_bl.shape)
        return jnp.einsum("bl,l->b", some.tokens_bl, 1 + jnp.arange(some.tokens_bl.shape[1]))

    found = reading([None] * 37, texts, 8).each(tokens)({})
    np.testing.assert_array_equal(found, tokens_bl @ (1 + np.arange(length)))
    assert seen == [(8, 16), (8, 32), (8, length)]  # each compiled once


def test_a_text_means_the_same_without_its_padding(
    tmp_path: Path, retriever_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted, "LENGTH_STEP", 4)
    save_tiny(tmp_path / "encoder", retriever_tokenizer_file)
    rows = [{"text": "north " * (1 + i % 7), "label": "positive"} for i in range(24)]
    write_jsonl(tmp_path / "dev.jsonl", rows)
    records = TASK.load(str(tmp_path / "dev.jsonl"))
    encoder = load_encoder(tmp_path / "encoder")
    asked = asked_by(TASK, encoder.model, encoder.tokenizer, True, 16)
    texts = prompt_texts(TASK, records, encoder.tokenizer, 16)
    assert texts.tokens_bl.shape[1] == 16
    assert asked.texts(records).tokens_bl.shape[1] == texts.lengths().max() == 12
    whole = asked.logits(encoder.params, texts, None)
    found = reading(records, texts, 7).logits(asked.logits)(encoder.params)
    np.testing.assert_allclose(found, whole, atol=1e-5)
