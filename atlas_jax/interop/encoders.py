"""Encoders of Hugging Face (BERT, ALBERT, RoBERTa, ELECTRA) and their heads, both ways.

A retriever is one tower or two without heads; an encoder model is one tower with the heads that
the source has. RoBERTa's vocabulary has `<s>` before `<pad>`; here padding is id 0, so the two rows
of the token table and of the MLM bias change places, and so do their ids in the tokenizer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.interop import bert_names
from atlas_jax.interop.encoder_names import PREFIXES, Names, encoder_names, head_names
from atlas_jax.interop.tensors import Part, Tensor, Tensors, not_allowed, transposed

KINDS = tuple(PREFIXES)  # `model_type` of a config.json, and our name of the encoder

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class _Said:
    """What the `config.json` of an encoder says; None where the defaults differ."""

    model_type: str
    vocab_size: bounds.Vocabulary
    hidden_size: bounds.Width
    num_hidden_layers: bounds.Layers
    num_attention_heads: bounds.Width
    intermediate_size: bounds.Width
    max_position_embeddings: bounds.Length
    hidden_act: str | None = None
    position_embedding_type: str | None = None
    hidden_dropout_prob: bounds.BelowOne | None = None
    type_vocab_size: bounds.Width = 2
    layer_norm_eps: bounds.BelowOne = 1e-12
    embedding_size: bounds.Width = 128
    num_hidden_groups: bounds.Layers = 1
    inner_group_num: bounds.Layers = 1
    pad_token_id: int | None = None


# hidden_act and hidden_dropout_prob of files that leave them out.
_DEFAULTS: dict[str, tuple[str, float]] = {
    "bert": ("gelu", 0.1), "albert": ("gelu_new", 0.0), "roberta": ("gelu", 0.1),
    "electra": ("gelu", 0.1),
}  # fmt: skip
_OWN_ACTIVATION = {"bert": "gelu", "albert": "gelu_tanh", "roberta": "gelu", "electra": "gelu"}
_EXCHANGED = ("embeddings/word_embeddings/embedding", "mlm/bias")  # of a RoBERTa
# The class that has these heads: `architectures` of a config.json.
_CLASSES: dict[str, dict[tuple[str, ...], str]] = {
    "bert": {(): "BertModel", ("mlm",): "BertForMaskedLM",
             ("mlm", "sentence"): "BertForPreTraining",
             ("sentence",): "BertForNextSentencePrediction"},
    "albert": {(): "AlbertModel", ("mlm",): "AlbertForMaskedLM",
               ("mlm", "sentence"): "AlbertForPreTraining"},
    "roberta": {(): "RobertaModel", ("mlm",): "RobertaForMaskedLM",
                ("sentence",): "RobertaForSequenceClassification"},
    "electra": {(): "ElectraModel", ("mlm",): "ElectraForMaskedLM",
                ("discriminator",): "ElectraForPreTraining"},
}  # fmt: skip


def encoder_fields(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a config that names its encoder, from a `config.json`.

    Raises:
      UserError: names the setting that no encoder here has.
    """
    said: _Said = strict_json.convert(config, _Said, str(path))
    kind = said.model_type
    own_activation, own_dropout = _DEFAULTS[kind]
    activation = said.hidden_act or own_activation
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{path}: hidden_act is {activation!r}; an encoder has "
            f"{', '.join(map(repr, _ACTIVATIONS))}"
        )
    if said.position_embedding_type not in (None, "absolute"):
        raise UserError(
            f"{path}: position_embedding_type is {said.position_embedding_type!r}; an encoder has "
            "'absolute'"
        )
    dropout = said.hidden_dropout_prob
    fields: dict[str, Any] = {
        **{ours: getattr(said, name) for ours, name in _SIZES.items()},
        "type_vocab_size": said.type_vocab_size,
        "layer_norm_eps": said.layer_norm_eps,
        "dropout_rate": own_dropout if dropout is None else dropout,
    }
    options = _options(said, path)
    if _ACTIVATIONS[activation] != _OWN_ACTIVATION[kind]:
        options["activation"] = _ACTIVATIONS[activation]
    if kind != "bert":
        fields["encoder"] = kind
    if options:
        fields["encoder_options"] = options
    return fields


def _options(said: _Said, path: Path) -> dict[str, Any]:
    """What this kind of encoder alone has, where it is not the default."""
    kind, options = said.model_type, dict[str, Any]()
    if kind in ("albert", "electra") and said.embedding_size != 128:
        options["factor_dim"] = said.embedding_size
    if kind == "albert" and said.num_hidden_groups != 1:
        options["num_groups"] = said.num_hidden_groups
    if kind == "albert" and said.inner_group_num != 1:
        options["inner_groups"] = said.inner_group_num
    if kind == "roberta" and said.pad_token_id not in (None, 1):
        raise UserError(f"{path}: pad_token_id is {said.pad_token_id}; a RoBERTa's is 1")
    return options


def encoder_json(config: Mapping[str, Any], heads: Sequence[str] = ()) -> dict[str, Any]:
    """The `config.json` of an encoder.

    Args:
      config: fields of a config that names its encoder.
      heads: what stands on it.

    Raises:
      UserError: Hugging Face has no class for it.
    """
    kind, options = config.get("encoder", "bert"), dict(config.get("encoder_options", {}))
    _check_expressible(kind, config, options, heads)
    activation = options.get("activation", _OWN_ACTIVATION[kind])
    dropout = config.get("dropout_rate", 0.1)
    found = {
        "architectures": [class_of(kind, heads)],
        "model_type": kind,
        **{name: config[ours] for ours, name in _SIZES.items()},
        "type_vocab_size": config.get("type_vocab_size", 2),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[activation],
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "pad_token_id": 1 if kind == "roberta" else 0,
    }
    if kind in ("albert", "electra"):
        found["embedding_size"] = options.get("factor_dim", 128)
    if kind == "albert":
        found["num_hidden_groups"] = options.get("num_groups", 1)
        found["inner_group_num"] = options.get("inner_groups", 1)
        found["classifier_dropout_prob"] = config.get("head_dropout_rate", 0.1)
    if kind == "roberta":
        found |= {"bos_token_id": 0, "eos_token_id": 2}
    return found


def class_of(kind: str, heads: Sequence[str] = ()) -> str:
    """Name of the class of transformers that has these heads on this encoder."""
    return _CLASSES[kind][tuple(sorted(heads))]


def _check_expressible(
    kind: str, config: Mapping[str, Any], options: Mapping[str, Any], heads: Sequence[str]
) -> None:
    if config.get("released_layer_norm"):
        raise UserError(
            "this retriever has the layer norm of the released Atlas models "
            "(RetrieverConfig.released_layer_norm), which no class of Hugging Face has: what it "
            "would load gives other embeddings. Write t5x or atlas-jax, or the reader alone "
            "(--part=reader)"
        )
    if options.get("sharing", "all") != "all":
        raise UserError(
            f"this ALBERT shares {options['sharing']!r}; Hugging Face's shares 'all' alone"
        )
    if options.get("position_offset", 2) != 2:
        raise UserError(
            f"this RoBERTa counts positions from {options['position_offset']}; Hugging Face's "
            "counts from 2"
        )
    if kind not in _CLASSES:
        raise UserError(
            f"an encoder of kind {kind!r} is not written as a model of Hugging Face; write "
            "atlas-jax"
        )
    if tuple(sorted(heads)) not in _CLASSES[kind]:
        raise UserError(
            f"Hugging Face has no {kind} with the heads {', '.join(heads) or 'none'} and nothing "
            "else; write atlas-jax"
        )


def towers_part(
    towers: Mapping[str, Tensors],
    config: dict[str, Any],
    where: str,
    allow_missing: Sequence[str] = (),
) -> Part:
    """A retriever of one tower or two from Hugging Face's state dicts.

    Args:
      towers: {'encoder': ...} or {'query_encoder': ..., 'passage_encoder': ...}.

    Raises:
      UserError: names the tensor that is absent or the buffer that is not 0, 1, 2, ...
    """
    part = Part("retriever", {**config, "tied": set(towers) == {"encoder"}}, {})
    names = tower_names(config)
    for tower, tensors in towers.items():
        source = bert_names.modern(tensors, PREFIXES[config.get("encoder", "bert")])
        mapped, missing = from_huggingface(source, names, where, allow_missing)
        part.tensors.update({f"{tower}/{name}": tensor for name, tensor in mapped.items()})
        part.missing += missing
        _account(part, source, config, where)
    return exchanged(part)


def model_part(
    tensors: Tensors, config: dict[str, Any], where: str, allow_missing: Sequence[str] = ()
) -> Part:
    """An encoder with every head that the state dict has whole.

    Raises:
      UserError: as `towers_part`; or a tied copy that differs from what it is tied to.
    """
    kind = config.get("encoder", "bert")
    source = bert_names.modern(tensors, PREFIXES[kind])
    mapped, missing = from_huggingface(source, tower_names(config), where, allow_missing)
    part = Part("encoder", dict(config), {}, missing=missing)
    part.tensors = {f"encoder/{name}": tensor for name, tensor in mapped.items()}
    heads = []
    for head, names in head_names(kind).items():
        names = {ours: (_bare(kind, theirs), turn) for ours, (theirs, turn) in names.items()}
        if all(theirs in source for theirs, _ in names.values()):
            heads.append(head)
            found, _ = from_huggingface(source, names, where)
            part.tensors.update({f"{head}/{name}": tensor for name, tensor in found.items()})
    part.config["heads"] = tuple(heads)
    if "sentence" in heads:
        part.config["num_classes"] = part.tensors["sentence/classifier/bias"].shape[0]
    _account(part, source, config, where)
    _explain_copies(part, kind, source, where)
    return exchanged(part)


def model_names(config: Mapping[str, Any]) -> Names:
    """Names of an encoder model, with the prefix that Hugging Face puts before the encoder's."""
    kind, heads = config.get("encoder", "bert"), tuple(config.get("heads", ()))
    prefix = PREFIXES[kind] if heads else ""
    names = {
        f"encoder/{ours}": (f"{prefix}{theirs}", turn)
        for ours, (theirs, turn) in tower_names(config).items()
    }
    for head in heads:
        below = head_names(kind)[head]
        names.update({f"{head}/{ours}": theirs for ours, theirs in below.items()})
    return names


def tower_names(config: Mapping[str, Any]) -> Names:
    """Names below one tower of a retriever."""
    options = {"factor_dim": 128, "num_groups": 1, "inner_groups": 1}
    options.update(config.get("encoder_options", {}))
    return encoder_names(config.get("encoder", "bert"), {**config, **options})


def _bare(kind: str, name: str) -> str:
    return name.removeprefix(PREFIXES[kind])


def _account(part: Part, source: Tensors, config: Mapping[str, Any], where: str) -> None:
    """Note every array of the source; buffers are checked and explained."""
    for name, tensor in source.items():
        label = tensor.sources[0]
        part.source[label] = tensor
        if name == bert_names.POSITION_IDS:
            numbers = tensor.read().reshape(-1)
            if not np.array_equal(numbers, np.arange(config["max_positions"])):
                raise UserError(f"{where}: {label} does not hold 0, 1, 2, ...")
            part.explained[label] = "0, 1, 2, ... by definition"


def _explain_copies(part: Part, kind: str, source: Tensors, where: str) -> None:
    """The output table of an MLM head and its bias, which are tied to others of the file."""
    word = source["embeddings.word_embeddings.weight"]
    decoders = {"bert": "cls.predictions.decoder", "albert": "predictions.decoder",
                "roberta": "lm_head.decoder", "electra": "generator_lm_head"}  # fmt: skip
    decoder = decoders[kind]
    bias = head_names(kind)["mlm"]["bias"][0]
    for copy, original in ((f"{decoder}.weight", word), (f"{decoder}.bias", source.get(bias))):
        if copy not in source or original is None or source[copy] is original:
            continue
        if not np.array_equal(source[copy].read(), original.read()):
            raise UserError(
                f"{where}: {copy} differs from {original.sources[0]}; an MLM head here is tied to "
                "its encoder's token table"
            )
        part.explained[source[copy].sources[0]] = f"equal to {original.sources[0]}"


def exchanged(part: Part) -> Part:
    """Rows 0 and 1 of a RoBERTa's vocabulary in each other's place; from and to its own order."""
    if part.config.get("encoder") != "roberta":
        return part
    tensors = {
        name: _first_two_exchanged(tensor) if name.endswith(_EXCHANGED) else tensor
        for name, tensor in part.tensors.items()
    }
    return dataclasses.replace(part, tensors=tensors)


def _first_two_exchanged(tensor: Tensor) -> Tensor:
    def get() -> np.ndarray:
        array = tensor.read().copy()
        array[[0, 1]] = array[[1, 0]]
        return array

    return dataclasses.replace(tensor, get=get, get_slice=None)


# --- names both ways -------------------------------------------------------------------


def from_huggingface(
    tensors: Tensors,
    names: Mapping[str, tuple[str, bool]],
    where: str,
    allow_missing: Sequence[str] = (),
) -> tuple[Tensors, tuple[str, ...]]:
    """Our tensors by our names, and which of theirs were absent and filled in."""
    absent = [theirs for theirs, _ in names.values() if theirs not in tensors]
    refused = not_allowed(absent, allow_missing)
    if refused:
        raise UserError(
            f"{where}: missing: {', '.join(refused[:8])}{', ...' if len(refused) > 8 else ''} "
            f"({len(refused)} of {len(names)} tensors)"
        )
    if len(absent) == len(names):
        raise UserError(f"{where}: holds none of the model's tensors")
    mapped: Tensors = {}
    for ours, (theirs, is_transposed) in names.items():
        if theirs in tensors:
            tensor = tensors[theirs]
            mapped[ours] = transposed(tensor) if is_transposed else tensor
    return mapped, tuple(absent)


def to_huggingface(tensors: Tensors, names: Mapping[str, tuple[str, bool]]) -> Tensors:
    """The inverse of `from_huggingface`: tensors by Hugging Face's names."""
    return {
        theirs: transposed(tensors[ours]) if is_transposed else tensors[ours]
        for ours, (theirs, is_transposed) in names.items()
    }
