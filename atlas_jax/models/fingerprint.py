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
    for name, leaf in sorted(traverse_util.flatten_dict(tower, sep="/").items()):
        array = np.ascontiguousarray(multihost.to_host(leaf))
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
