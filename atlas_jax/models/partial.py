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

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from flax.core import meta
from safetensors.numpy import save_file

from atlas_jax.core import strict_json
from atlas_jax.core.bounds import check_fields
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import file_sha256, input_file, open_to_all
from atlas_jax.core.types import Params
from atlas_jax.interop.safetensors_files import read_arrays
from atlas_jax.models.expects import NOTHING, Expects, combined, from_json, to_json
from atlas_jax.models.fingerprint import encoder_hash
from atlas_jax.models.folder import ModelPart, load_expects, load_model, save_model
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.reader.from_tower import reader_tokenizer, start_from_tower
from atlas_jax.reader.t5 import T5
from atlas_jax.retriever.config import RetrieverConfig
from atlas_jax.retriever.dual_encoder import is_tied

PARTIAL_FORMAT = 2
_WITHOUT_EXPECTS = 1  # an older format, in which a part does not say what the pair expects
_CONFIG, _WEIGHTS = "part.json", "reader.safetensors"


@dataclasses.dataclass(frozen=True)
class _Content:
    """What `part.json` says: fields of the reader, SHA-256 of its weights, and `about`."""

    format: int
    reader: dict[str, Any]
    sha256: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    expects: Any = None


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
        "expects": to_json(load_expects(model)),
        "about": dict(about or {}),
        "sha256": file_sha256(folder / _WEIGHTS),
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def join(part: str | Path, base: str | Path, output: str | Path) -> None:
    """Write the whole model folder of a part, with the retriever of the base.

    The pair reads as the part says. Where it says nothing, the retriever reads as the base says.

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
    wanted = content.about.get("base")
    if wanted and wanted != found:
        raise UserError(
            f"{folder} belongs to a retriever with the fingerprint {str(wanted)[:12]}; "
            f"{base} holds {found[:12]}"
        )
    config = _reader_config(content.reader, folder)
    own = traverse_util.unflatten_dict(_own_params(folder / _WEIGHTS, config), sep="/")
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
        about=content.about,
        expects=_expects(content, folder) or combined(NOTHING, load_expects(base)),
    )


def _expects(content: _Content, folder: Path) -> Expects | None:
    if content.format == _WITHOUT_EXPECTS:
        return None
    return from_json(content.expects, f"{folder / _CONFIG}: expects")


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


def _own_params(path: Path, config: ReaderConfig) -> dict[str, np.ndarray]:
    """A part's parameters by name, which are just those that are not the retriever's."""
    model, tokens = T5(config), np.ones((1, 2), np.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    leaves = traverse_util.flatten_dict(meta.unbox(boxed), sep="/")
    wanted = {name: leaf.shape for name, leaf in leaves.items() if not _is_frozen(name, config)}
    arrays = read_arrays(path)
    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            here, there = (shapes.get(name, "absent") for shapes in (found, wanted))
            raise UserError(f"{path}: {name} is {here}, but of this part it has to be {there}")
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _read(folder: Path) -> _Content:
    path = folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is no part of a model: it has no {_CONFIG}")
    content: _Content = strict_json.read(path, _Content)
    found = file_sha256(input_file(folder / _WEIGHTS))
    if content.format not in (_WITHOUT_EXPECTS, PARTIAL_FORMAT):
        raise UserError(f"{path}: expected a part of format {_WITHOUT_EXPECTS} or {PARTIAL_FORMAT}")
    check_fields(ReaderConfig, content.reader, f"{path}: reader")
    if found != content.sha256:
        raise UserError(
            f"{folder / _WEIGHTS} is not the file that was saved: its SHA-256 is {found[:12]}, "
            f"{_CONFIG} says {content.sha256[:12]}; copy the folder again"
        )
    return content
