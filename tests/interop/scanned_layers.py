"""Gradients of a few scanned T5 parameters, and the same by layer; sizes that Adafactor factors."""

import numpy as np

LAYERS, STEPS = 2, 2
# Embedding, heads, channels per head: more channels than the embedding has, as many, and fewer.
CASES = {"wide": (128, 4, 40), "even": (128, 4, 32), "narrow": (160, 4, 32)}
MLP = 192


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the scanned parameters of an encoder, by name."""
    embedding, heads, channels = CASES[case]
    return {
        "encoder/encoder/attention/query/kernel": (embedding, LAYERS, heads, channels),
        "encoder/encoder/attention/out/kernel": (heads, LAYERS, channels, embedding),
        "encoder/encoder/mlp/wi_0/kernel": (embedding, LAYERS, MLP),
        "encoder/encoder/mlp/wo/kernel": (MLP, LAYERS, embedding),
        "encoder/encoder/pre_mlp_layer_norm/scale": (embedding, LAYERS),
    }


def gradients(case: str, step: int) -> dict[str, np.ndarray]:
    """Gradients of one step; their size varies along every axis."""
    rng = np.random.default_rng(step)
    made = {}
    for name, shape in shapes(case).items():
        array = rng.standard_normal(shape)
        for axis, size in enumerate(shape):
            scale = np.exp(rng.standard_normal(size))
            array = array * scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        made[name] = array.astype(np.float32)
    return made


def split(scanned: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by layer, heads joined: written apart from the converter, to check it."""
    made = {}
    for name, array in scanned.items():
        rest = name.removeprefix("encoder/encoder/")
        for i in range(LAYERS):
            layer = array[:, i]
            if "query" in rest:
                layer = layer.reshape(layer.shape[0], -1)
            elif "out/" in rest:
                layer = layer.reshape(-1, layer.shape[-1])
            made[f"encoder/layers_{i}/{rest}"] = layer
    return made
