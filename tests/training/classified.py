"""A tiny encoder, and texts whose class one word tells, for the tests of classifiers."""

from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.jsonl import write_jsonl
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.encoders.model import EncoderModelConfig
from atlas_jax.models.encoder_folder import Encoder, save_encoder, with_heads
from atlas_jax.tasks.classification import SST2Task

TASK = SST2Task(
    query_format="{text} is {mask} .", label_words={"negative": "small", "positive": ["large"]}
)
WORDS = "what capital country title river city people speak language lies".split()


def save_tiny(folder: Path, tokenizer_file: Path, seed: int = 1) -> Path:
    """One layer of width 16 with random weights and an MLM head, in a folder."""
    tokenizer = Tokenizer.from_file(tokenizer_file)
    config = EncoderModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32,
        max_positions=16, dropout_rate=0.0,
    )  # fmt: skip
    save_encoder(folder, with_heads(Encoder(config, {}, tokenizer), ("mlm",), seed))
    return folder


def write_texts(path: Path, rows: int, seed: int = 0) -> Path:
    """Texts of four words; one of them is `north` in positive ones and `south` in negative ones."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for number in range(rows):
        words = [str(word) for word in rng.choice(WORDS, 3)]
        positive = number % 2 == 0
        words.insert(int(rng.integers(4)), "north" if positive else "south")
        lines.append({"text": " ".join(words), "label": "positive" if positive else "negative"})
    write_jsonl(path, lines)
    return path
