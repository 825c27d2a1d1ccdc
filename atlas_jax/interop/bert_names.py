"""Names of a BERT encoder's parameters in Hugging Face's state dict."""

import re
from collections.abc import Mapping

from atlas_jax.interop.tensors import Tensor, Tensors, needed_shape

POSITION_IDS = "embeddings.position_ids"  # a buffer that holds 0, 1, 2, ...
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


def huggingface_names(num_layers: int) -> dict[str, tuple[str, bool]]:
    """Our name below a tower -> (Hugging Face's name, whether it is transposed)."""
    names: dict[str, tuple[str, bool]] = {}
    for table in ("word", "position", "token_type"):
        here = f"embeddings/{table}_embeddings/embedding"
        names[here] = (f"embeddings.{table}_embeddings.weight", False)
    names.update(_norm("embeddings/layer_norm", "embeddings.LayerNorm"))
    for i in range(num_layers):
        here, there = f"layers_{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            names.update(_dense(f"{here}/attention/{name}", f"{there}.attention.self.{name}"))
        names.update(_dense(f"{here}/attention/output", f"{there}.attention.output.dense"))
        names.update(_norm(f"{here}/attention_layer_norm", f"{there}.attention.output.LayerNorm"))
        names.update(_dense(f"{here}/intermediate", f"{there}.intermediate.dense"))
        names.update(_dense(f"{here}/output", f"{there}.output.dense"))
        names.update(_norm(f"{here}/output_layer_norm", f"{there}.output.LayerNorm"))
    return names


def _dense(here: str, there: str) -> dict[str, tuple[str, bool]]:
    return {
        f"{here}/kernel": (f"{there}.weight", True),
        f"{here}/bias": (f"{there}.bias", False),
    }


def _norm(here: str, there: str) -> dict[str, tuple[str, bool]]:
    return {
        f"{here}/scale": (f"{there}.weight", False),
        f"{here}/bias": (f"{there}.bias", False),
    }


def modern(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under the names of today's BertModel.

    In the first releases a norm has `gamma` and `beta`. Models with a head have the prefix `bert.`
    in the encoder's names.
    """
    prefix = "bert." if any(name.startswith("bert.embeddings.") for name in tensors) else ""
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
