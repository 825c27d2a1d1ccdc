"""A tiny corpus, questions and a gin file, for tests of whole runs."""

import json
from pathlib import Path
from typing import Any

COUNTRIES = ("Arvo", "Bera", "Coro", "Dela", "Emin", "Fasa", "Gond", "Hila")
CAPITALS = ("Lindel", "Tomund", "Essin", "Parva", "Quorl", "Rivat", "Sumel", "Tarn")

GIN = """
ReaderConfig.vocab_size = 368
ReaderConfig.emb_dim = 16
ReaderConfig.num_heads = 2
ReaderConfig.num_encoder_layers = 1
ReaderConfig.num_decoder_layers = 1
ReaderConfig.head_dim = 8
ReaderConfig.mlp_dim = 32
RetrieverConfig.vocab_size = 144
RetrieverConfig.hidden_dim = 16
RetrieverConfig.num_layers = 1
RetrieverConfig.num_heads = 2
RetrieverConfig.mlp_dim = 32
RetrieverConfig.max_positions = 64
StoreConfig.reader_length = 48
StoreConfig.retriever_length = 48
CorpusConfig.embed_batch_size = 8
DataConfig.batch_size = 8
DataConfig.query_length = 64
DataConfig.retriever_query_length = 48
DataConfig.target_length = 8
StepConfig.k = 3
StepConfig.reader_length = 112
EvalConfig.batch_size = 8
EvalConfig.recall_at = (1, 5)
GenerationConfig.max_length = 4
TrainConfig.log_every = 1
reader/OptimizerConfig.learning_rate = 1e-3
reader/OptimizerConfig.total_steps = 50
retriever/OptimizerConfig.learning_rate = 1e-3
retriever/OptimizerConfig.total_steps = 50
"""


def write_run(folder: Path, reader_tokenizer: Path, retriever_tokenizer: Path) -> Path:
    """Write passages, questions and run.gin; all paths are bound but TrainConfig.model_dir."""
    passages, questions = [], []
    for number, (country, capital) in enumerate(zip(COUNTRIES, CAPITALS, strict=True)):
        text, other = f"The capital of {country} is {capital}.", f"In {country} people speak Arvic."
        passages.append({"id": f"p{number}", "title": country, "section": "Cities", "text": text})
        passages.append({"id": f"r{number}", "title": country, "text": other})
        questions.append(
            {
                "id": f"q{number}",
                "question": f"What is the capital of {country}?",
                "answers": [capital, f"the city {capital}"],
                "gold": [f"p{number}"],
                "passages": [
                    {"id": "g0", "title": country, "text": text},
                    {"id": "g1", "title": country, "text": other},
                ],
            }
        )
    paths: dict[str, Any] = {
        "ModelConfig.reader_tokenizer": reader_tokenizer,
        "ModelConfig.retriever_tokenizer": retriever_tokenizer,
        "CorpusConfig.passages": write_lines(folder / "passages.jsonl", passages),
        "CorpusConfig.store": folder / "store",
        "TrainConfig.file": write_lines(folder / "train.jsonl", questions[:6]),
        "EvalConfig.file": write_lines(folder / "test.jsonl", questions[5:]),
    }
    gin_file = folder / "run.gin"
    bindings = "".join(f"{name} = '{path}'\n" for name, path in paths.items())
    gin_file.write_text(GIN + bindings, encoding="utf-8")
    return gin_file


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
