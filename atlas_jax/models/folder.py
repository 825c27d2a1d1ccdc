"""Model folders: what a run leaves behind for others.

A folder holds parameters (safetensors), configs and tokenizers, the SHA-256 of each file, and what
the models expect to read. It is written under a temporary name and then renamed, so it is never
seen half-written.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from atlas_jax.core import multihost, strict_json
from atlas_jax.core.bounds import check_fields, shown
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import (
    as_path,
    check_fetched,
    check_name,
    copy_files,
    file_sha256,
    is_remote,
    kind_of,
    local_folder,
    open_to_all,
)
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.whole import whole_folder
from atlas_jax.interop.safetensors_files import read_arrays
from atlas_jax.models.expects import NOTHING, Expects, from_json, to_json
from atlas_jax.reader.config import ReaderConfig
from atlas_jax.retriever.config import RetrieverConfig

FOLDER_FORMAT = 2
_WITHOUT_EXPECTS = 1  # an older format, in which a folder does not say what its models expect
_CONFIG_FILE = "config.json"
_CONFIGS: dict[str, Any] = {"reader": ReaderConfig, "retriever": RetrieverConfig}
_LAYER = re.compile(r"(encoder|decoder|query_encoder|passage_encoder)/layers_(\d+)/")
_DEPTHS = {
    "num_layers": "encoder", "num_encoder_layers": "encoder", "num_decoder_layers": "decoder",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """One model of a folder: its config fields, float32 parameters and tokenizer."""

    config: dict[str, Any]
    params: Any
    tokenizer: Tokenizer


def save_model(
    directory: str | Path,
    parts: Mapping[str, ModelPart],
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    expects: Expects = NOTHING,
) -> None:
    """Write a model folder, atomically; a folder already there is replaced.

    The folder holds `config.json` (configs, `expects`, `about`, SHA-256 of every other file) and,
    for each part, `<part>.safetensors` and `<part>_tokenizer.json`.

    Args:
      parts: e.g. {"reader": ..., "retriever": ...}; params are nested dicts of arrays.
      dtype: 'float32' or 'bfloat16', in which parameters are stored.
      about: JSON values for people (the run, its steps).
      expects: what the models expect to read.

    Raises:
      UserError: the folder could not be written; an earlier one is untouched.
    """
    # Every host takes part in gathering sharded parameters; only the first one writes.
    arrays = {name: _flat_host_arrays(part.params, dtype) for name, part in parts.items()}
    try:
        if multihost.is_first():
            _write_model(directory, parts, arrays, about, expects)
    finally:
        multihost.barrier("model folder")  # no process exits while the folder is being written


def _write_model(
    directory: str | Path,
    parts: Mapping[str, ModelPart],
    arrays: Mapping[str, dict[str, np.ndarray]],
    about: Mapping[str, Any] | None,
    expects: Expects,
) -> None:
    try:
        with _new_folder(directory) as folder:
            for name, part in parts.items():
                weights = folder / f"{name}.safetensors"
                save_file(arrays[name], weights)
                open_to_all(weights)
                part.tokenizer.save(folder / f"{name}_tokenizer.json")
            configs = {name: part.config for name, part in parts.items()}
            write_folder_config(folder, configs, about, expects)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model folder {directory} could not be written: {one_line(error)}"
        ) from error


@contextlib.contextmanager
def _new_folder(directory: str | Path) -> Iterator[Path]:
    """A temporary folder on the disk. When the block succeeds it moves to its place or bucket."""
    if not is_remote(directory):
        with whole_folder(directory, replace=True) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="atlas-jax-") as name:
        yield Path(name)
        copy_files(Path(name), as_path(directory), last=_CONFIG_FILE)


def write_folder_config(
    folder: Path,
    configs: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    expects: Expects = NOTHING,
) -> None:
    """Write the `config.json` of a model folder that has all its other files.

    Args:
      configs: the config fields of each part.
      about: JSON values for people.
      expects: what the models expect to read.
    """
    config = {
        "format": FOLDER_FORMAT,
        "models": dict(configs),
        "expects": to_json(expects),
        "about": dict(about or {}),
        "sha256": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """What `config.json` says: fields of the parts, SHA-256 of the other files, and what models
    expect to read (`expects`, which `expects.from_json` checks).
    """

    format: int
    models: dict[str, Any]
    sha256: dict[str, str]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    expects: Any = None


@dataclasses.dataclass(frozen=True)
class FolderPart:
    """The files of one model in a folder, verified but not loaded.

    Attributes:
      config: fields of its config.
      weights, tokenizer: files that every part has.
      optimizer: file of a converted optimiser state, or None.
    """

    config: dict[str, Any]
    weights: Path
    tokenizer: Path
    optimizer: Path | None


def open_model(directory: str | Path) -> dict[str, FolderPart]:
    """Open the parts of a model folder without loading them, to read one array at a time.

    Raises:
      UserError: as `load_model`.
    """
    folder = local_folder(str(directory))
    config = _read_folder_config(folder)
    parts = {}
    for name, fields in config.models.items():
        state = f"{name}_optimizer.safetensors"
        parts[name] = FolderPart(
            config=fields,
            weights=_verified(folder, f"{name}.safetensors", config),
            tokenizer=_verified(folder, f"{name}_tokenizer.json", config),
            optimizer=_verified(folder, state, config) if state in config.sha256 else None,
        )
    return parts


def load_model(directory: str | Path, names: tuple[str, ...] = ()) -> dict[str, ModelPart]:
    """Read a model folder, all parts or those named, and verify every file it reads.

    Returns:
      Parts with float32 numpy parameters.

    Raises:
      UserError: no such folder, no such part, a file missing or not the one that was
        saved (its SHA-256 differs), or a parameter that is not finite.
    """
    folder = local_folder(str(directory))
    config = _read_folder_config(folder)
    wanted = names or tuple(config.models)
    for name in wanted:
        _check_has(folder, name, config)
    return {name: _load_part(folder, name, config) for name in wanted}


def load_expects(directory: str | Path) -> Expects:
    """What the models of a folder expect to read; of an older folder, nothing.

    Raises:
      UserError: no such folder, or its config is damaged.
    """
    folder = as_path(directory)  # in a bucket, too, only this one file is read
    config = _read_folder_config(folder)
    if config.format == _WITHOUT_EXPECTS:
        return NOTHING
    return from_json(config.expects, f"{folder / _CONFIG_FILE}: expects")


def load_config(directory: str | Path, name: str) -> dict[str, Any]:
    """The config fields of one model of a folder, without its parameters.

    Raises:
      UserError: no such folder, or no such part.
    """
    folder = as_path(directory)  # in a bucket, too, only this one file is read
    config = _read_folder_config(folder)
    _check_has(folder, name, config)
    return dict(config.models[name])


def load_tokenizer(directory: str | Path, name: str) -> Tokenizer:
    """Read one model's tokenizer from a model folder, verified, without its parameters.

    Raises:
      UserError: as `load_model`.
    """
    folder = as_path(directory)  # in a bucket, too, only these two files are read
    config = _read_folder_config(folder)
    _check_has(folder, name, config)
    return Tokenizer.from_file(_verified(folder, f"{name}_tokenizer.json", config))


def _load_part(folder: Path, name: str, config: FolderConfig) -> ModelPart:
    arrays = read_arrays(_verified(folder, f"{name}.safetensors", config))
    check_depth(config.models[name], arrays, f"{folder / _CONFIG_FILE}: models.{name}")
    flat = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
    return ModelPart(
        config=config.models[name],
        params=traverse_util.unflatten_dict(flat, sep="/"),
        tokenizer=Tokenizer.from_file(_verified(folder, f"{name}_tokenizer.json", config)),
    )


def check_depth(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse a config with more or fewer layers than the file holds, before memory is allocated.

    Args:
      config: fields of a reader's or a retriever's config.
      names: of its parameters.

    Raises:
      UserError: names `where`, the field, and both numbers of layers.
    """
    layers: dict[str, set[str]] = {"encoder": set(), "decoder": set()}
    for name in names:
        found = _LAYER.match(name)
        if found:
            layers["decoder" if found[1] == "decoder" else "encoder"].add(found[2])
    for field, stack in _DEPTHS.items():
        if layers[stack] and config.get(field, len(layers[stack])) != len(layers[stack]):
            raise UserError(
                f"{where}.{field} = {shown(config[field])}, but the file holds "
                f"{len(layers[stack])} layers"
            )


def _verified(folder: Path, name: str, config: FolderConfig) -> Path:
    check_name(name)
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise UserError(f"model folder {folder} lacks {name}")
    check_fetched(file)
    found, expected = file_sha256(file), config.sha256.get(name)
    if found != expected:
        raise UserError(
            f"{file} is not the file that was saved: its SHA-256 is {found[:12]}, "
            f"{_CONFIG_FILE} says {str(expected)[:12]}; copy the folder again"
        )
    return file


def _check_has(folder: Path, name: str, config: FolderConfig) -> None:
    if name not in config.models:
        has = ", ".join(config.models) or "none"
        raise UserError(f"model folder {folder} has no {name}; it has {has}")


def _read_folder_config(folder: Path) -> FolderConfig:
    """Read `config.json` and check the types of its fields and of the parts' fields.

    Raises:
      UserError: there is no such file, or a field is at fault; names the file and the field.
    """
    path = folder / _CONFIG_FILE
    if kind_of(path) == "nothing":
        raise UserError(f"{folder} is not a model folder: it has no {_CONFIG_FILE}")
    found: dict[str, Any] = strict_json.read(path, dict[str, Any])
    if found.get("format") not in (_WITHOUT_EXPECTS, FOLDER_FORMAT):
        raise UserError(
            f"{path}: expected a model folder's config of format {_WITHOUT_EXPECTS} or "
            f"{FOLDER_FORMAT}"
        )
    config: FolderConfig = strict_json.convert(found, FolderConfig, str(path))
    for name, fields in config.models.items():
        strict_json.convert(fields, dict[str, Any], f"{path}: models.{name}")
        if name in _CONFIGS:
            check_fields(_CONFIGS[name], fields, f"{path}: models.{name}")
    return config


def _flat_host_arrays(params: Any, dtype: str) -> dict[str, np.ndarray]:
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    flat = traverse_util.flatten_dict(multihost.to_host(params), sep="/")
    return {name: np.ascontiguousarray(value, dtype=target) for name, value in flat.items()}
