"""A small folder with a reader's own parameters; it names the retriever that gave it the rest.

The lower layers and the token embedding of a pair encoder come from the retriever and are not
trained (`ReaderConfig`). A retriever that was not trained here either need not be stored twice.
`cut` leaves both out of a model folder. `join` puts them back from a folder with the retriever.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import file_sha256, open_to_all
from atlas_jax.core.types import Params
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.folder import ModelPart, load_model, save_model
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import is_tied

PARTIAL_FORMAT = 1
_CONFIG, _WEIGHTS = "part.json", "reader.safetensors"


def cut(model: str | Path, output: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a model folder's reader in bfloat16, without what it has from the retriever.

    Args:
      model: a model folder whose reader has a pair encoder that began as the retriever's tower.
      output: a folder. In one that exists, only the files that this function writes change.
      about: JSON values for people.

    Raises:
      UserError: the reader's encoder is of another kind, or its frozen part is not the
        retriever's.
    """
    parts = load_model(model)
    reader, retriever = parts["reader"], parts["retriever"]
    config = _reader_config(reader.config, model)
    frozen = start_from_tower(reader.params, _tower(retriever.params), config, _end(retriever))
    flat, base = (traverse_util.flatten_dict(p, sep="/") for p in (reader.params, frozen))
    kept = {name: leaf for name, leaf in flat.items() if not _is_frozen(name, config)}
    for name in flat.keys() - kept.keys():
        if not np.allclose(flat[name], base[name], atol=0.01, rtol=0.01):  # stored bfloat16 differs
            raise UserError(f"{model}: {name} of the reader is not the retriever's")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(leaf, ml_dtypes.bfloat16) for name, leaf in kept.items()},
        folder / _WEIGHTS,
    )
    open_to_all(folder / _WEIGHTS)
    content = {
        "format": PARTIAL_FORMAT,
        "reader": reader.config,
        "about": dict(about or {}),
        "sha256": file_sha256(folder / _WEIGHTS),
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def join(part: str | Path, base: str | Path, output: str | Path) -> None:
    """Write the whole model folder of a part, with the retriever of the base.

    Args:
      part: what `cut` wrote.
      base: a model folder with the retriever from which the reader's encoder was made.
      output: the model folder.

    Raises:
      UserError: a folder is at fault, or the part was cut from another base.
    """
    folder = Path(part)
    content = _read(folder)
    retriever = load_model(base, ("retriever",))["retriever"]
    retriever_config = RetrieverConfig(**retriever.config)
    found = encoder_hash(retriever_config, retriever.params, retriever.tokenizer)
    wanted = content["about"].get("base")
    if wanted and wanted != found:
        raise UserError(
            f"{folder} belongs to a retriever with the fingerprint {str(wanted)[:12]}; "
            f"{base} holds {found[:12]}"
        )
    config = _reader_config(content["reader"], folder)
    own = traverse_util.unflatten_dict(
        {k: v.astype(np.float32) for k, v in load_file(folder / _WEIGHTS).items()}, sep="/"
    )
    layers = {f"layers_{i}": None for i in range(config.apart_layers)}
    drawn = {**own, "encoder": {**layers, **own["encoder"]}}
    whole = start_from_tower(drawn, _tower(retriever.params), config, _end(retriever))
    for name in own["encoder"]:
        whole["encoder"][name] = own["encoder"][name]
    save_model(
        output,
        {
            "reader": ModelPart(
                dataclasses.asdict(config), whole, reader_tokenizer(retriever.tokenizer)
            ),
            "retriever": retriever,
        },
        about=content["about"],
    )


def fingerprint(model: str | Path) -> str:
    """The fingerprint of a model folder's retriever, for `about["base"]` of a part."""
    part = load_model(model, ("retriever",))["retriever"]
    return encoder_hash(RetrieverConfig(**part.config), part.params, part.tokenizer)


def _reader_config(fields: Mapping[str, Any], where: str | Path) -> ReaderConfig:
    config = ReaderConfig(**fields)
    if config.encoder != "pair":
        raise UserError(f"{where}: the reader has no pair encoder, so there is nothing to cut")
    return config


def _is_frozen(name: str, config: ReaderConfig) -> bool:
    lower = [f"encoder/layers_{i}/" for i in range(config.apart_layers)]
    return name.startswith(("token_embedder/", "encoder/embeddings/", *lower))


def _tower(params: Params) -> Params:
    tower: Params = params["encoder"] if is_tied(params) else params["passage_encoder"]
    return tower


def _end(retriever: ModelPart) -> int:
    return retriever.tokenizer.eos_id


def _read(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found = file_sha256(folder / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no part of a model: {one_line(error)}") from error
    if content.get("format") != PARTIAL_FORMAT:
        raise UserError(f"{path}: expected a part of format {PARTIAL_FORMAT}")
    if found != content["sha256"]:
        raise UserError(
            f"{folder / _WEIGHTS} is not the file that was saved: its SHA-256 is {found[:12]}, "
            f"{_CONFIG} says {content['sha256'][:12]}; copy the folder again"
        )
    return content
