"""Sound inputs of every kind, small and made in seconds, for tests that break them."""

import dataclasses
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
from flax import traverse_util

from atlas_jax.conversion.convert import Conversion, convert, expected_shapes
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.index.new_index import new_index
from atlas_jax.index.passages import PassageStore
from atlas_jax.index.store_files import StoreConfig
from atlas_jax.interop.tensors import Part
from atlas_jax.interop.vocabularies import from_wordpiece
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.folder import ModelPart, save_model
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.retriever.config import RetrieverConfig
from tests.index.flat_store import write_flat, write_flat_index
from tests.interop import small
from tests.training.runs import write_run

READER = ReaderConfig(
    vocab_size=128, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    head_dim=4, mlp_dim=8,
)  # fmt: skip
RETRIEVER = RetrieverConfig(
    vocab_size=64, hidden_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=64
)
LENGTH = 48
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Arvo",
            "paragraphs": [
                {
                    "context": "The capital of Arvo is Lindel.",
                    "qas": [
                        {
                            "id": "a1",
                            "question": "What is the capital of Arvo?",
                            "answers": [{"text": "Lindel", "answer_start": 23}],
                        }
                    ],
                }
            ],
        }
    ],
}


def build(folder: Path) -> None:
    """Write models, stores, indices, shards/, squad/, and some files."""
    reader = small.reader_tokenizer(folder)
    retriever = folder / "retriever.json"
    retriever.write_text(from_wordpiece(small.wordpiece_file(folder)))
    write_run(folder, reader, retriever)
    tokenizers = Tokenizer.from_file(reader), Tokenizer.from_file(retriever)
    rng = np.random.default_rng(0)
    parts = {}
    for name, config, tokenizer in zip(
        ("reader", "retriever"), (READER, RETRIEVER), tokenizers, strict=True
    ):
        fields = dataclasses.asdict(config)
        shapes = expected_shapes(Part(name, fields, {}))
        flat = {n: rng.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}
        parts[name] = ModelPart(fields, traverse_util.unflatten_dict(flat, sep="/"), tokenizer)
    save_model(folder / "model", parts)
    store = PassageStore.build(
        folder / "passages.jsonl", folder / "store", *tokenizers,
        StoreConfig(reader_length=LENGTH, retriever_length=LENGTH), progress=False,
    )  # fmt: skip
    made_by = encoder_hash(RETRIEVER, parts["retriever"].params, tokenizers[1])
    embeddings_ne = rng.normal(size=(store.count, 8)).astype(np.float32)
    flat = PassageStore.open(write_flat(store, folder / "flat"))
    for name, of, dtype in (
        ("index", store, "float32"), ("index8", store, "int8"), ("new_flat_index", flat, "float32")
    ):  # fmt: skip
        with new_index(folder / name, of, made_by, 8, dtype) as out_ne:
            out_ne[:] = embeddings_ne
    write_flat_index(folder / "new_flat_index", folder / "flat_index")
    for target, part in (("hf", ""), ("t5x", "reader")):
        job = Conversion("atlas-jax", target, (str(folder / "model"),), str(folder / target), part)
        convert(job, lambda line: None)
    _write_data(folder)


def _write_data(folder: Path) -> None:
    text = (folder / "passages.jsonl").read_bytes()
    (folder / "passages.jsonl.gz").write_bytes(gzip.compress(text * 50, mtime=0))
    (folder / "x.gin").write_text("# comment\nK = 2\nDataConfig.query_length = 32\n")
    (folder / "squad").mkdir()
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (folder / "squad" / name).write_text(json.dumps(SQUAD))
    (folder / "corpus.jsonl").write_bytes(text)
    (folder / "shards").mkdir()
    records = [json.loads(line) for line in text.splitlines()]
    (folder / "shards" / "passages.0.pt").write_bytes(pickle.dumps(records, 2))
