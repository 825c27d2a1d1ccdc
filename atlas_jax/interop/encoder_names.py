"""Names of the parameters of encoders and heads in Hugging Face's state dict.

BERT, RoBERTa and ELECTRA have the same names for layers but not for heads. ALBERT has other names
for everything.
"""

from collections.abc import Mapping
from typing import Any

Names = dict[str, tuple[str, bool]]  # our name -> (Hugging Face's, whether it is transposed)

# Prefix of the encoder's names in a model with a head.
PREFIXES = {"bert": "bert.", "albert": "albert.", "roberta": "roberta.", "electra": "electra."}


def encoder_names(encoder: str, config: Mapping[str, Any]) -> Names:
    """Names below a tower, without the prefix that they have in a model with heads.

    Args:
      encoder: kind of the encoder.
      config: fields of its config.
    """
    names: Names = {}
    for table in ("word", "position", "token_type"):
        here = f"embeddings/{table}_embeddings/embedding"
        names[here] = (f"embeddings.{table}_embeddings.weight", False)
    names.update(_norm("embeddings/layer_norm", "embeddings.LayerNorm"))
    if encoder == "albert":
        names.update(_dense("embedding_projection", "encoder.embedding_hidden_mapping_in"))
        for g in range(config["num_groups"]):
            for j in range(config["inner_groups"]):
                there = f"encoder.albert_layer_groups.{g}.albert_layers.{j}"
                names.update(_albert_layer(f"groups_{g}/layers_{j}", there))
        return names
    if encoder == "electra" and config["factor_dim"] != config["hidden_dim"]:
        names.update(_dense("embedding_projection", "embeddings_project"))
    for i in range(config["num_layers"]):
        names.update(_bert_layer(f"layers_{i}", f"encoder.layer.{i}"))
    return names


def _bert_layer(here: str, there: str) -> Names:
    names: Names = {}
    for name in ("query", "key", "value"):
        names.update(_dense(f"{here}/attention/{name}", f"{there}.attention.self.{name}"))
    names.update(_dense(f"{here}/attention/output", f"{there}.attention.output.dense"))
    names.update(_norm(f"{here}/attention_layer_norm", f"{there}.attention.output.LayerNorm"))
    names.update(_dense(f"{here}/intermediate", f"{there}.intermediate.dense"))
    names.update(_dense(f"{here}/output", f"{there}.output.dense"))
    names.update(_norm(f"{here}/output_layer_norm", f"{there}.output.LayerNorm"))
    return names


def _albert_layer(here: str, there: str) -> Names:
    names: Names = {}
    for name in ("query", "key", "value"):
        names.update(_dense(f"{here}/attention/{name}", f"{there}.attention.{name}"))
    names.update(_dense(f"{here}/attention/output", f"{there}.attention.dense"))
    names.update(_norm(f"{here}/attention_layer_norm", f"{there}.attention.LayerNorm"))
    names.update(_dense(f"{here}/intermediate", f"{there}.ffn"))
    names.update(_dense(f"{here}/output", f"{there}.ffn_output"))
    names.update(_norm(f"{here}/output_layer_norm", f"{there}.full_layer_layer_norm"))
    return names


def head_names(encoder: str) -> dict[str, Names]:
    """Hugging Face's names of an encoder's heads, by this project's name of the head."""
    if encoder == "bert":
        mlm = _mlm("cls.predictions.transform", "LayerNorm", "cls.predictions.bias")
        return {"mlm": mlm, "sentence": _sentence("bert.pooler.dense", "cls.seq_relationship")}
    if encoder == "albert":
        mlm = _mlm("predictions", "LayerNorm", "predictions.bias")
        return {"mlm": mlm, "sentence": _sentence("albert.pooler", "sop_classifier.classifier")}
    if encoder == "roberta":
        mlm = _mlm("lm_head", "layer_norm", "lm_head.bias")
        return {"mlm": mlm, "sentence": _sentence("classifier.dense", "classifier.out_proj")}
    mlm = _mlm("generator_predictions", "LayerNorm", "generator_lm_head.bias")
    replaced = {
        **_dense("transform", "discriminator_predictions.dense"),
        **_dense("classifier", "discriminator_predictions.dense_prediction"),
    }
    return {"mlm": mlm, "discriminator": replaced}


def _mlm(there: str, norm: str, bias: str) -> Names:
    return {
        **_dense("transform", f"{there}.dense"),
        **_norm("layer_norm", f"{there}.{norm}"),
        "bias": (bias, False),
    }


def _sentence(pooler: str, classifier: str) -> Names:
    return {**_dense("pooler/dense", pooler), **_dense("classifier", classifier)}


def _dense(here: str, there: str) -> Names:
    return {
        f"{here}/kernel": (f"{there}.weight", True),
        f"{here}/bias": (f"{there}.bias", False),
    }


def _norm(here: str, there: str) -> Names:
    return {
        f"{here}/scale": (f"{there}.weight", False),
        f"{here}/bias": (f"{there}.bias", False),
    }
