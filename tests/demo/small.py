"""A Factbook of a few passages and a model of a few parameters, for tests of whole runs."""

import dataclasses
from pathlib import Path

import gin

from atlas_jax import from_gin
from atlas_jax.core.devices import use_devices
from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.demo import factbook
from atlas_jax.models.assembly import assemble, export_model
from atlas_jax.models.config import ModelConfig

COUNTRIES = ("Arvo", "Bera", "Coro", "Deva")


def _passage(number, name):
    text = f"Capital: {name} City. Population: {number + 1},000. Languages: {name}ic."
    return {"id": f"p{number}", "title": name, "section": "Government", "text": text}


def _question(number, name):
    return {
        "id": f"q{number}",
        "question": f"What is the capital of {name}?",
        "answers": [f"{name} City"],
        "gold": [f"p{number}"],
        "title": name,
        "entity": name.lower(),
        "relation": "capital",
        "group": "static",
    }


PASSAGES = [_passage(n, name) for n, name in enumerate(COUNTRIES)] + [
    {**_passage(n, f"Extra {n}"), "id": f"x{n}"} for n in range(30)
]
QUESTIONS = [_question(n, name) for n, name in enumerate(COUNTRIES)]


def prepare_small(directory: Path, progress: bool = True) -> dict[str, int]:
    """What `factbook.prepare` does, with the passages and questions above."""
    rows = {"passages.jsonl": PASSAGES, "test.jsonl": QUESTIONS}
    rows["passages_pretraining.jsonl"] = PASSAGES
    rows |= {factbook.few_shot_name(seed): QUESTIONS[:2] for seed in factbook.FEW_SHOT_SEEDS}
    return {"relations": 1} | {n: write_jsonl(directory / n, r) for n, r in rows.items()}


def tiny_checkpoint(folder: Path, reader_tokenizer: Path, retriever_tokenizer: Path) -> Path:
    """A model folder with random parameters."""
    for name, value in {
        "ReaderConfig.vocab_size": 512, "ReaderConfig.emb_dim": 16, "ReaderConfig.num_heads": 2,
        "ReaderConfig.head_dim": 8, "ReaderConfig.mlp_dim": 32,
        "ReaderConfig.num_encoder_layers": 1, "ReaderConfig.num_decoder_layers": 1,
        "RetrieverConfig.vocab_size": 512, "RetrieverConfig.hidden_dim": 16,
        "RetrieverConfig.num_layers": 1, "RetrieverConfig.num_heads": 2,
        "RetrieverConfig.mlp_dim": 32, "RetrieverConfig.max_positions": 256,
    }.items():  # fmt: skip
        gin.bind_parameter(name, value)
    config = ModelConfig(
        reader_tokenizer=str(reader_tokenizer), retriever_tokenizer=str(retriever_tokenizer)
    )
    spec = dataclasses.replace(from_gin.models(), config=config)
    with use_devices(from_gin.devices()) as (mesh, rules):
        made = assemble(spec, mesh, rules)
        export_model(folder, made.models, made.params, made.tokenizers, "float32", {})
    return folder
