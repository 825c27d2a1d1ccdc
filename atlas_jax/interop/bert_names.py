"""Names of BERT's state dicts of all ages, and the sizes that its arrays tell."""

import re
from collections.abc import Mapping

from atlas_jax.interop.tensors import Tensor, Tensors, needed_shape

POSITION_IDS = "embeddings.position_ids"  # a buffer that holds 0, 1, 2, ...
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


def modern(tensors: Mapping[str, Tensor], prefix: str = "bert.") -> Tensors:
    """The tensors by the names of today's BertModel, or of a relative of BERT's.

    In the first releases a norm has `gamma` and `beta`. Models with a head have `prefix` in the
    encoder's names.
    """
    if not any(name.startswith(f"{prefix}embeddings.") for name in tensors):
        prefix = ""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = name.removeprefix(prefix)
        for old, now in (("gamma", "weight"), ("beta", "bias")):
            if new.endswith(f"LayerNorm.{old}"):
                new = new.removesuffix(old) + now
        renamed[new] = tensor
    return renamed


def config_from_state_dict(tensors: Mapping[str, Tensor], where: str) -> dict[str, object]:
    """The sizes of a BERT by the shapes of its arrays; heads are assumed to be 64 wide.

    Raises:
      UserError: names the first required array that is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        return needed_shape(tensors, name, where, "BERT encoder")

    layers = [int(found[1]) for name in tensors if (found := _LAYER.match(name))]
    vocab, width = shape("embeddings.word_embeddings.weight")
    return {
        "vocab_size": vocab,
        "hidden_dim": width,
        "num_layers": max(layers, default=-1) + 1,
        "num_heads": max(width // 64, 1),
        "mlp_dim": shape("encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape("embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
    }
