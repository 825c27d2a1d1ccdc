"""Model folders of Hugging Face: T5 readers, encoders, sentence-transformers, both ways.

T5 1.0 uses the embedding as its head and scales the logits. T5 1.1, with its LM-adapted and Flan
forms, has a head of its own and does not scale. Old and new config files express this in different
ways, and some files store the same matrix several times. So this module checks all that it reads
against the arrays themselves.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from atlas_jax.core import bounds, strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_name
from atlas_jax.interop import encoders, sentence_transformers, t5_names
from atlas_jax.interop.safetensors_files import INDEX, SINGLE, read_file, write_sharded
from atlas_jax.interop.tensors import Part, Tensors, of_array
from atlas_jax.interop.torch_files import load_state_dict
from atlas_jax.interop.vocabularies import exchanged_ids, find_tokenizer

_BIN = "pytorch_model.bin"
_TOWERS = ("query_encoder", "passage_encoder")
_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
T5_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class _T5:
    """The fields of a T5's `config.json`."""

    vocab_size: bounds.Vocabulary
    d_model: bounds.Width
    num_heads: bounds.Width
    d_kv: bounds.Width
    d_ff: bounds.Width
    num_layers: bounds.Layers
    num_decoder_layers: bounds.Layers | None = None
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: float = T5_EPSILON
    # Transformers 5 writes scale_decoder_outputs, and always says that the embeddings are tied.
    scale_decoder_outputs: bool | None = None
    tie_word_embeddings: bool = True
    relative_attention_num_buckets: bounds.Width = 32
    relative_attention_max_distance: bounds.Width = 128
    dropout_rate: bounds.BelowOne = 0.1


class _Index(TypedDict):
    """The index of a sharded folder: the file of each tensor."""

    weight_map: dict[str, str]


def read_folder(
    folder: str | Path,
    allow_missing: Sequence[str] = (),
    tokenizer: str | Path = "",
    heads: bool = False,
) -> Part:
    """Read a model folder, T5 or an encoder by its `config.json`; no array is read yet.

    Args:
      allow_missing: patterns of Hugging Face's names that may be missing. Then a norm's scale
        is 1 and everything else 0.
      tokenizer: a tokenizer to use in place of the folder's.
      heads: give an encoder with its heads, not a retriever.

    Raises:
      UserError: names the file, setting or tensor that is missing, unknown or does not fit.
    """
    folder = Path(folder)
    towers = [folder / name for name in _TOWERS]
    if all(tower.is_dir() for tower in towers):
        return _read_towers(towers, allow_missing, tokenizer)
    said = sentence_transformers.read(folder)
    place = said.transformer
    config = read_json(place / "config.json")
    tensors = read_tensors(place)
    kind = config.get("model_type")
    if kind in ("t5", "mt5"):  # mT5 is a T5 1.1 with another vocabulary
        part = t5_part(tensors, t5_config(config, tensors, place), str(place), allow_missing)
    elif kind in encoders.KINDS:
        fields = encoders.encoder_fields(config, place / "config.json")
        if heads:
            part = encoders.model_part(tensors, fields, str(place), allow_missing)
        else:
            fields |= sentence_transformers.pooling_of(said, config)
            part = encoders.towers_part({"encoder": tensors}, fields, str(place), allow_missing)
            part.texts = said.texts
    else:
        raise UserError(
            f"{place / 'config.json'}: model_type is {kind!r}; this reads 't5', 'mt5' (T5 1.0, "
            "1.1, LM-adapted, Flan), 'bert' (BERT, Contriever, MiniLM), 'albert', 'roberta' and "
            "'electra'"
        )
    part.tokenizer = find_tokenizer(Path(tokenizer) if tokenizer else place, part.kind)
    return part


def kind_of(folder: Path) -> str:
    """'reader' or 'retriever', by the folder's files."""
    if (folder / _TOWERS[0]).is_dir():
        return "retriever"
    place = sentence_transformers.read(folder).transformer
    is_t5 = read_json(place / "config.json").get("model_type") in ("t5", "mt5")
    return "reader" if is_t5 else "retriever"


def _read_towers(
    folders: Sequence[Path], allow_missing: Sequence[str], tokenizer: str | Path
) -> Part:
    """Read an untied retriever from the two folders that `write_folder` writes."""
    towers: dict[str, Tensors] = {}
    configs, texts = [], []
    for folder in folders:
        said = sentence_transformers.read(folder)
        config = read_json(said.transformer / "config.json")
        fields = encoders.encoder_fields(config, said.transformer / "config.json")
        configs.append(fields | sentence_transformers.pooling_of(said, config))
        texts.append(said.texts)
        towers[folder.name] = {
            name: dataclasses.replace(tensor, sources=(f"{folder.name}/{name}",))
            for name, tensor in read_tensors(said.transformer).items()
        }
    if configs[0] != configs[1] or texts[0] != texts[1]:
        raise UserError(f"{folders[0]} and {folders[1]} describe different models")
    part = encoders.towers_part(towers, configs[0], str(folders[0].parent), allow_missing)
    part.texts = texts[0]
    place = Path(tokenizer) if tokenizer else folders[0]
    part.tokenizer = find_tokenizer(place, part.kind)
    return part


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file does not exist or does not hold a JSON object.
    """
    content: dict[str, Any] = strict_json.read(path, dict[str, Any])
    return content


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, in any of the file formats, in one file or in shards.

    Raises:
      UserError: there are no tensors; or a shard, or a tensor of the index, is missing; or two
        shards have the same tensor.
    """
    readers: tuple[tuple[str, Callable[[Path], Tensors]], ...] = (
        (SINGLE, read_file),
        (INDEX, read_file),
        (_BIN, load_state_dict),
        (f"{_BIN}.index.json", load_state_dict),
    )
    for name, read in readers:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return read(path)
        index: _Index = strict_json.read(path, _Index)
        return _sharded(folder, path, index["weight_map"], read)
    names = ", ".join(name for name, _ in readers)
    raise UserError(f"{folder}: has none of {names}")


def _sharded(
    folder: Path, index: Path, weight_map: dict[str, str], read: Callable[[Path], Tensors]
) -> Tensors:
    tensors: Tensors = {}
    homes: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        check_name(file)
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{index}: the shard {file} is not in the folder")
        for name, tensor in read(folder / file).items():
            if name in homes:
                raise UserError(f"{folder / file}: {name} is in {homes[name]}, too")
            homes[name], tensors[name] = file, tensor
    for name, file in weight_map.items():
        if homes.get(name) != file:
            raise UserError(f"{folder / file}: {name} is missing, which {index.name} promises")
    return tensors


def t5_config(config: Mapping[str, Any], tensors: Tensors, folder: Path) -> dict[str, Any]:
    """Fields of a ReaderConfig.

    Raises:
      UserError: names a setting that no reader of this project has.
    """
    path = folder / "config.json"
    said: _T5 = strict_json.convert(config, _T5, str(path))
    projection = said.feed_forward_proj
    if projection not in _ACTIVATIONS:
        raise UserError(
            f"{path}: feed_forward_proj is {projection!r}; a reader has "
            f"{' or '.join(map(repr, _ACTIVATIONS))}"
        )
    epsilon = said.layer_norm_epsilon
    if epsilon != T5_EPSILON:
        raise UserError(f"{path}: layer_norm_epsilon is {epsilon}; a reader's is {T5_EPSILON}")
    scaled = said.scale_decoder_outputs
    if scaled is None:
        scaled = said.tie_word_embeddings
    if scaled and t5_names.LM_HEAD in tensors and not _equal(tensors, t5_names.LM_HEAD):
        raise UserError(
            f"{path} says that embedding and head are tied (a T5 1.0), but {t5_names.LM_HEAD} "
            f"differs from {t5_names.SHARED}; for a T5 1.1 write "
            '"tie_word_embeddings": false into it'
        )
    return {
        "vocab_size": said.vocab_size,
        "emb_dim": said.d_model,
        "num_heads": said.num_heads,
        "head_dim": said.d_kv,
        "mlp_dim": said.d_ff,
        "num_encoder_layers": said.num_layers,
        "num_decoder_layers": said.num_decoder_layers or said.num_layers,
        "mlp_activations": _ACTIVATIONS[projection],
        "logits_via_embedding": scaled,
        "relpos_buckets": said.relative_attention_num_buckets,
        "relpos_max_distance": said.relative_attention_max_distance,
        "dropout_rate": said.dropout_rate,
    }


def t5_part(
    tensors: Tensors, config: dict[str, Any], where: str, allow_missing: Sequence[str] = ()
) -> Part:
    """A reader from Hugging Face's state dict.

    Raises:
      UserError: names the tensor that is missing, or that should be a copy but is not.
    """
    source = dict(tensors)
    explained: dict[str, str] = {}
    copies = [*t5_names.COPIES, *([t5_names.LM_HEAD] if config["logits_via_embedding"] else [])]
    if t5_names.SHARED not in source:  # some writers only use one of its other names
        for name in t5_names.COPIES:
            if name in source:
                source = {t5_names.SHARED: source[name], **source}
                break
    untied = not config["logits_via_embedding"]
    if untied and t5_names.LM_HEAD not in source and t5_names.SHARED in source:
        source[t5_names.LM_HEAD] = source[t5_names.SHARED]  # without a head it is the embedding
    for name in copies:
        if name in source:
            if not _equal(source, name):
                raise UserError(
                    f"{where}: {name} differs from {t5_names.SHARED}; a T5 has one embedding"
                )
            explained[name] = f"equal to {t5_names.SHARED}"
    if t5_names.NEVER_READ in source:
        explained[t5_names.NEVER_READ] = "a table that no implementation of T5 reads"
    names = t5_names.huggingface_names(config)
    mapped, missing = encoders.from_huggingface(source, names, where, allow_missing)
    labels = {tensor.sources[0]: tensor for tensor in tensors.values()}
    explained = {tensors[name].sources[0]: why for name, why in explained.items()}
    return Part("reader", config, mapped, source=labels, explained=explained, missing=missing)


def _equal(tensors: Tensors, name: str) -> bool:
    first, second = tensors[t5_names.SHARED], tensors[name]
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.get is second.get or bool(np.array_equal(first.read(), second.read()))


# --- both ways -------------------------------------------------------------------------


def fill_missing(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give neutral values to tensors that are missing, as allowed."""
    for name, shape in shapes.items():
        if name not in part.tensors and part.missing:
            value = np.ones if name.endswith("scale") else np.zeros
            part.tensors[name] = of_array(value(shape, np.float32), f"{name} (filled in)")


def write_folder(part: Part, folder: Path, max_bytes: int) -> None:
    """Write a folder that `transformers` and sentence-transformers can load.

    An untied retriever becomes two folders, `query_encoder` and `passage_encoder`.

    Args:
      folder: an existing folder; the caller gives it its final name when it is complete.
      max_bytes: of one shard.

    Raises:
      UserError: the model has a feature that Hugging Face's class lacks.
    """
    if part.kind == "reader":
        names = t5_names.huggingface_names(part.config)
        tensors = encoders.to_huggingface(part.tensors, names)
        _write(folder, tensors, t5_json(part), max_bytes)
    elif part.kind == "encoder":
        part = encoders.exchanged(part)
        names = encoders.model_names(part.config)
        settings = encoders.encoder_json(part.config, part.config["heads"])
        if "sentence" in part.config["heads"]:
            settings["num_labels"] = part.config["num_classes"]
        _write(folder, encoders.to_huggingface(part.tensors, names), settings, max_bytes)
    else:
        part = encoders.exchanged(part)
        names = encoders.tower_names(part.config)
        for tower in sorted({name.split("/")[0] for name in part.tensors}):
            below = {
                name.removeprefix(f"{tower}/"): tensor
                for name, tensor in part.tensors.items()
                if name.startswith(f"{tower}/")
            }
            place = folder if tower == "encoder" else folder / tower
            place.mkdir(exist_ok=True)
            settings = {
                **encoders.encoder_json(part.config),
                "pooling": part.config.get("pooling", "average"),
            }
            _write(place, encoders.to_huggingface(below, names), settings, max_bytes)
            sentence_transformers.write(place, part.config)
            _write_tokenizer(part, place)
        return
    _write_tokenizer(part, folder)


def _write(folder: Path, tensors: Tensors, config: dict[str, Any], max_bytes: int) -> None:
    types = {tensor.dtype.name for tensor in tensors.values()}
    if len(types) == 1:
        config = {**config, "torch_dtype": types.pop()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    write_sharded(folder, tensors, max_bytes)


def _write_tokenizer(part: Part, folder: Path) -> None:
    if part.tokenizer is None:
        return
    text, kind = part.tokenizer, part.config.get("encoder", "bert")
    is_roberta = part.kind != "reader" and kind == "roberta"
    (folder / "tokenizer.json").write_text(exchanged_ids(text) if is_roberta else text, "utf-8")
    if part.kind == "reader":
        names: dict[str, Any] = {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>",
                                 "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    elif is_roberta:
        names = {"tokenizer_class": "RobertaTokenizerFast", "bos_token": "<s>",
                 "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                 "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
                 "model_max_length": part.config["max_positions"] - 2}  # fmt: skip
    elif kind == "albert":
        names = {"tokenizer_class": "AlbertTokenizerFast", "cls_token": "[CLS]",
                 "sep_token": "[SEP]", "pad_token": "<pad>", "unk_token": "<unk>",
                 "mask_token": "[MASK]", "model_max_length": part.config["max_positions"],
                 }  # fmt: skip
    else:
        names = {"tokenizer_class": "BertTokenizerFast", "cls_token": "[CLS]",
                 "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
                 "mask_token": "[MASK]",
                 "model_max_length": part.config["max_positions"]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", "utf-8")


def t5_json(part: Part) -> dict[str, Any]:
    """The `config.json` of a reader."""
    config = part.config
    projections = {activations: name for name, activations in _ACTIVATIONS.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config["vocab_size"],
        "d_model": config["emb_dim"],
        "d_kv": config["head_dim"],
        "d_ff": config["mlp_dim"],
        "num_layers": config["num_encoder_layers"],
        "num_decoder_layers": config["num_decoder_layers"],
        "num_heads": config["num_heads"],
        "relative_attention_num_buckets": config.get("relpos_buckets", 32),
        "relative_attention_max_distance": config.get("relpos_max_distance", 128),
        "dropout_rate": config.get("dropout_rate", 0.1),
        "layer_norm_epsilon": T5_EPSILON,
        "feed_forward_proj": projections[tuple(config["mlp_activations"])],
        "tie_word_embeddings": bool(config["logits_via_embedding"]),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
