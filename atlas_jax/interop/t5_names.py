"""Where each parameter of a T5 lies in Hugging Face's state dict.

This project's names are T5X's. Hugging Face keeps matrices as (out, in) and the table of
relative positions as (buckets, heads); both are transposed here.
"""

import re
from collections.abc import Iterable, Mapping

from atlas_jax.core.errors import UserError
from atlas_jax.interop.tensors import Tensor, needed_shape

EMBEDDING = "token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"
SHARED = "shared.weight"
# Further names of the shared embedding, which must hold the same numbers.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LM_HEAD = "lm_head.weight"
_LETTERS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_LAYER = re.compile(r"(encoder|decoder)\.block\.(\d+)\.")
# A table that the first releases of T5 1.0 saved and that no implementation reads.
NEVER_READ = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def huggingface_names(config: Mapping[str, object]) -> dict[str, tuple[str, bool]]:
    """Our name -> (Hugging Face's name, whether it is transposed), all of a model's.

    Args:
      config: fields of a ReaderConfig.

    Raises:
      UserError: the reader has experts.
    """
    if config.get("num_experts"):
        raise UserError(
            f"this reader has {config['num_experts']} experts in a layer, and a T5 of Hugging Face "
            "or Meta has none; write atlas-jax"
        )
    names: dict[str, tuple[str, bool]] = {EMBEDDING: (SHARED, False)}
    for stack in ("encoder", "decoder"):
        for i in range(int(str(config[f"num_{stack}_layers"]))):
            names.update(_layer(stack, i, config["mlp_activations"]))
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{stack}/relpos_bias/rel_embedding"] = (first, True)
        names[f"{stack}/{stack}_norm/scale"] = (f"{stack}.final_layer_norm.weight", False)
    if not config["logits_via_embedding"]:
        names[HEAD] = (LM_HEAD, True)
    return names


def _layer(stack: str, i: int, activations: object) -> dict[str, tuple[str, bool]]:
    here, there = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
    attentions = [("SelfAttention", "attention", "pre_attention_layer_norm")]
    if stack == "decoder":
        attentions = [
            ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
            ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ]
    names: dict[str, tuple[str, bool]] = {}
    for j, (theirs, ours, norm) in enumerate(attentions):
        for name, letter in _LETTERS.items():
            names[f"{here}/{ours}/{name}/kernel"] = (f"{there}.{j}.{theirs}.{letter}.weight", True)
        names[f"{here}/{norm}/scale"] = (f"{there}.{j}.layer_norm.weight", False)
    last = f"{there}.{len(attentions)}"
    for name in [*mlp_inputs(activations), "wo"]:
        names[f"{here}/mlp/{name}/kernel"] = (f"{last}.DenseReluDense.{name}.weight", True)
    names[f"{here}/pre_mlp_layer_norm/scale"] = (f"{last}.layer_norm.weight", False)
    return names


def mlp_inputs(activations: object) -> list[str]:
    """Names of the projections into the MLP."""
    count = len(list(activations)) if isinstance(activations, Iterable) else 0
    return ["wi"] if count == 1 else [f"wi_{i}" for i in range(count)]


def config_from_state_dict(tensors: Mapping[str, Tensor], where: str) -> dict[str, object]:
    """The sizes of a T5 as its arrays tell them; dropout and the like stay at defaults.

    Whether the head is tied is decided by the caller, who knows the version.

    Raises:
      UserError: names the first array that is needed and absent.
    """

    def shape(name: str) -> tuple[int, ...]:
        return needed_shape(tensors, name, where, "T5")

    layers = {"encoder": 0, "decoder": 0}
    for name in tensors:
        found = _LAYER.match(name)
        if found:
            layers[found[1]] = max(layers[found[1]], int(found[2]) + 1)
    vocab, width = shape(SHARED)
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shape(f"{first}.relative_attention_bias.weight")
    joined = shape(f"{first}.q.weight")[0]
    mlp = "encoder.block.0.layer.1.DenseReluDense"
    gated = f"{mlp}.wi_0.weight" in tensors
    return {
        "vocab_size": vocab,
        "emb_dim": width,
        "num_heads": heads,
        "head_dim": joined // heads,
        "mlp_dim": shape(f"{mlp}.{'wi_0' if gated else 'wi'}.weight")[0],
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "relpos_buckets": buckets,
    }
