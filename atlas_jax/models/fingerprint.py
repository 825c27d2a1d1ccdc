"""What identifies the embeddings that a retriever gives."""

import hashlib
import json

import numpy as np
from flax import traverse_util

from atlas_jax.core import multihost
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import is_tied

# What a passage's embedding depends on, beside the parameters of its tower.
_ENCODER_FIELDS = (
    "hidden_dim",
    "num_heads",
    "pooling",
    "normalize",
    "layer_norm_eps",
    "released_layer_norm",
)


def encoder_hash(config: RetrieverConfig, params: Params, tokenizer: Tokenizer) -> str:
    """Fingerprint of everything that decides a passage's embedding.

    The query tower is left out: query-side training keeps the index valid, and so does
    untying a tied retriever.

    Args:
      config: of the retriever.
      params: of the retriever, tied or not.
      tokenizer: of the retriever.
    """
    tower = params["encoder"] if is_tied(params) else params["passage_encoder"]
    fields = {name: getattr(config, name) for name in _ENCODER_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(tokenizer.content_hash.encode())
    for name, leaf in sorted(traverse_util.flatten_dict(tower, sep="/").items()):
        array = np.ascontiguousarray(multihost.to_host(leaf))
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
