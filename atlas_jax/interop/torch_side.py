"""The other side of `convert --verify`: Hugging Face's own model, layer by layer.

This is the only file of the package that imports PyTorch and transformers. It does so inside its
functions, for users who have them and ask for the comparison.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.interop.encoders import class_of
from atlas_jax.interop.tensors import BFLOAT16, Tensor

EMBEDDING = "embedding"  # a retriever's result, made from its last layer's states
# A model for PyTorch: a folder, or a config and tensors with Hugging Face's names.
TheirModel = Path | tuple[dict[str, Any], Mapping[str, Tensor]]


def is_installed() -> bool:
    """Whether the comparison can be made at all."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def t5_layers(
    source: TheirModel,
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


def encoder_layers(
    source: TheirModel,
    tokens: np.ndarray,
    config: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """States before and after every layer of an encoder, and what stands on it.

    That is the logits of each head, or, of a retriever, its embedding.

    Args:
      tokens: [n, l] in this project's ids; 0 is padding.
      config: fields of an EncoderModelConfig, or of a RetrieverConfig. The pooling is the
        config's if the source is not a folder of sentence-transformers.
    """
    import torch

    model = _encoder(source, config)
    ids = torch.tensor(tokens).long()
    mask = (ids != 0).long()
    if config.get("encoder") == "roberta":  # its ids 0 and 1 stand in each other's place here
        ids = torch.where(ids < 2, 1 - ids, ids)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states
    found = {"embeddings": states[0].numpy()}
    if len(states) == config["num_layers"] + 1:  # ALBERT's inner groups give more
        found.update({f"layers_{i}": x.numpy() for i, x in enumerate(states[1:])})
    found[f"layers_{config['num_layers'] - 1}"] = states[-1].numpy()
    if "pooling" in config:
        found[EMBEDDING] = _embedding(states[-1], mask, source, config)
    heads = config.get("heads", ())
    names = {"mlm": ("prediction_logits", "logits"), "discriminator": ("logits",),
             "sentence": ("sop_logits", "seq_relationship_logits", "logits")}  # fmt: skip
    for head in heads:
        logits = next(output[name] for name in names[head] if name in output)
        if head == "mlm" and config.get("encoder") == "roberta":
            logits = logits[..., [1, 0, *range(2, logits.shape[-1])]]
        found[head] = logits.numpy()
    return found


def _encoder(source: TheirModel, config: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    name = class_of(str(config.get("encoder", "bert")), config.get("heads", ()))
    model_class = getattr(transformers, name)
    if isinstance(source, Path):
        place = source / _modules(source).get("Transformer", "")
        model = model_class.from_pretrained(place, dtype=torch.float32)
    else:
        model = model_class(model_class.config_class(**source[0]))
        model.load_state_dict(_state_dict(source[1]), strict=False)
        model.tie_weights()
    model.eval()
    if config["released_layer_norm"]:

        def uncentred(self: Any, x: Any) -> Any:
            scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)
            return (x - x.mean(-1, keepdim=True)) * scale * self.weight + self.bias

        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.forward = uncentred.__get__(module)
    return model


def _embedding(states: Any, mask: Any, source: TheirModel, config: Mapping[str, Any]) -> np.ndarray:
    import torch

    pooling, normalize = str(config["pooling"]), bool(config["normalize"])
    if isinstance(source, Path) and (source / "modules.json").is_file():
        pooling, normalize = _pooled(source)
    real = mask.unsqueeze(-1).to(states.dtype)
    count = real.sum(1).clamp(min=1)
    embedding = states[:, 0]
    if pooling != "cls":
        embedding = (states * real).sum(1) / (count.sqrt() if pooling == "sqrt" else count)
    if normalize:
        embedding = torch.nn.functional.normalize(embedding, dim=-1)
    return np.asarray(embedding.numpy())


def _modules(folder: Path) -> dict[str, str]:
    """Kind -> path of the modules that a folder lists, read apart from the converter."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text("utf-8")) if path.is_file() else []
    kinds = {module["type"].rpartition(".")[2]: module.get("path", "") for module in modules}
    return {("Transformer" if kind == "BERT" else kind): path for kind, path in kinds.items()}


def _pooled(folder: Path) -> tuple[str, bool]:
    """Pooling and normalisation as a folder says them; a cosine of plain sums is normalised."""
    kinds = _modules(folder)
    said = json.loads((folder / kinds["Pooling"] / "config.json").read_text("utf-8"))
    is_cls = said.get("pooling_mode_cls_token") or said.get("pooling_mode") == "cls"
    is_sqrt = said.get("pooling_mode_mean_sqrt_len_tokens") or (
        said.get("pooling_mode") == "mean_sqrt_len_tokens"
    )
    whole = folder / "config_sentence_transformers.json"
    scores = json.loads(whole.read_text("utf-8")) if whole.is_file() else {}
    is_cosine = scores.get("similarity_fn_name") == "cosine"
    pooling = "cls" if is_cls else "sqrt" if is_sqrt else "average"
    return pooling, "Normalize" in kinds or is_cosine


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
