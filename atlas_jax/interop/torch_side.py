"""The other side of `convert --verify`: Hugging Face's own model, layer by layer.

The only file of the package that imports PyTorch and transformers, inside of its functions,
for a user who has them and asks for the comparison; nothing else ever calls it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.interop.tensors import BFLOAT16, Tensor

# What a model is made of: a folder, or a config and tensors with Hugging Face's names.
Source = Path | tuple[dict[str, Any], Mapping[str, Tensor]]


def is_installed() -> bool:
    """Whether the comparison can be made at all."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def t5_layers(
    source: Source,
    tokens: np.ndarray,
    decoder_input: np.ndarray,
) -> dict[str, np.ndarray]:
    """Outputs of every layer of a T5, by this project's names.

    Args:
      tokens: [n, l]; 0 is padding.
      decoder_input: [n, t].
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    if isinstance(source, Path):
        model = T5ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    else:
        config = T5Config(**source[0])
        # Transformers 5 always says True, and would make one matrix of embedding and head.
        config.tie_word_embeddings = source[0]["tie_word_embeddings"]
        model = T5ForConditionalGeneration(config)
        model.set_input_embeddings(model.shared)  # one embedding for both stacks, tied or not
        model.load_state_dict(_state_dict(source[1]), strict=False)
    model.eval()
    found: dict[str, np.ndarray] = {}
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, block in enumerate(stack.block):
            _record(block, f"{name}/layers_{i}", found)
        _record(stack.final_layer_norm, f"{name}/{name}_norm", found)
    ids, inputs = torch.tensor(tokens).long(), torch.tensor(decoder_input).long()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=inputs)
    found["logits"] = output.logits.numpy()
    return found


def bert_layers(
    source: Source,
    tokens: np.ndarray,
    released_layer_norm: bool,
) -> dict[str, np.ndarray]:
    """Outputs of every layer of a BERT encoder, by this project's names."""
    import torch
    from transformers import BertConfig, BertModel

    if isinstance(source, Path):
        model = BertModel.from_pretrained(source, add_pooling_layer=False, dtype=torch.float32)
    else:
        model = BertModel(BertConfig(**source[0]), add_pooling_layer=False)
        model.load_state_dict(_state_dict(source[1]), strict=False)
    model.eval()
    if released_layer_norm:

        def uncentred(self: Any, x: Any) -> Any:
            scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)
            return (x - x.mean(-1, keepdim=True)) * scale * self.weight + self.bias

        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.forward = uncentred.__get__(module)
    found: dict[str, np.ndarray] = {}
    _record(model.embeddings, "embeddings", found)
    for i, layer in enumerate(model.encoder.layer):
        _record(layer, f"layers_{i}", found)
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long())
    return found


def _record(module: Any, name: str, found: dict[str, np.ndarray]) -> None:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    module.register_forward_hook(hook)


def _state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    import torch

    state = {}
    for name, tensor in tensors.items():
        array = tensor.read()
        state[name] = torch.tensor(array.astype(np.float32) if array.dtype == BFLOAT16 else array)
    return state
