"""What identifies a model, and the embeddings that a retriever gives."""

import hashlib
import json

import numpy as np
from flax import traverse_util

from atlas_jax.core import multihost
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import is_tied


def model_hash(params: Params, tokenizer: Tokenizer) -> str:
    """Fingerprint of a model's parameters and tokenizer, however its folder was written.

    Args:
      params: of a reader or retriever, as a model folder gives them.
      tokenizer: of it.
    """
    digest = hashlib.sha256(tokenizer.content_hash.encode())
    _update(digest, params)
    return digest.hexdigest()


def encoder_hash(config: RetrieverConfig, params: Params, tokenizer: Tokenizer) -> str:
    """Fingerprint of everything that decides a passage's embedding.

    It covers the kind of encoder, every field of its config that can change its output (see
    `EncoderConfig.output_fields`), pooling, tokenizer and parameters. It does not cover the query
    tower. So an index stays valid in query-side training, and when a tied retriever is untied.

    Args:
      config: of the retriever.
      params: of the retriever, tied or not.
      tokenizer: of the retriever.
    """
    tower = params["encoder"] if is_tied(params) else params["passage_encoder"]
    fields = {
        **config.tower.output_fields(),
        "pooling": config.pooling,
        "normalize": config.normalize,
    }
    if config.encoder != "bert":  # older fingerprints do not have this field
        fields["encoder"] = config.encoder
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(tokenizer.content_hash.encode())
    _update(digest, tower)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", params: Params) -> None:
    for name, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(multihost.to_host(leaf))
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.data)
