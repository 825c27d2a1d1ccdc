"""A small reader, its parameters, and a batch of passages, for the tests of this folder."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax.core import meta

from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.t5 import T5

CONFIG = ReaderConfig(
    vocab_size=24,
    emb_dim=12,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.2,
)
# Reads pairs: two layers for a passage alone, one for question and passage together.
PAIR = ReaderConfig(
    vocab_size=120,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=3,
    num_decoder_layers=1,
    mlp_activations=("relu",),
    dropout_rate=0.0,
    encoder="pair",
    apart_layers=2,
    encoder_mlp_dim=16,
    max_positions=16,
    pointer=True,
    pointer_ends=True,
)


def config(**changes: Any) -> ReaderConfig:
    return dataclasses.replace(CONFIG, **changes)


def random_params(model: T5, seed: int = 0) -> Any:
    """Numbers of no special size or sign: every parameter matters, norms included."""
    tokens = np.ones((1, 2), np.int32)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))["params"]
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        scale = 0.5 if "kernel" in jax.tree_util.keystr(path) else 1.0
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def passages() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, 4, 5] whose last row has two passages only, and targets [3, 4]."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, CONFIG.vocab_size, (3, 4, 5)).astype(np.int32)
    tokens[0, 1, 3:] = 0
    tokens[1, :, 4:] = 0
    tokens[2, 2:] = 0
    targets = np.array([[5, 6, 7, 1], [8, 1, 0, 0], [9, 10, 1, 0]], np.int32)
    return tokens, targets
