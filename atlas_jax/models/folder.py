"""Model folders: what a run leaves behind for others.

A folder holds parameters (safetensors), configs and tokenizers, the SHA-256 of each file, and what
the models expect to read. It is written under a temporary name and then renamed, so it is never
seen half-written.
"""

import contextlib
import dataclasses
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

from atlas_jax.core import multihost
from atlas_jax.core.bounds import shown
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import (
    as_path,
    copy_files,
    is_remote,
    local_folder,
    open_to_all,
)
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.core.types import Params
from atlas_jax.core.whole import whole_folder
from atlas_jax.interop.safetensors_files import read_arrays, read_file
from atlas_jax.models.expects import NOTHING, Expects, from_json
from atlas_jax.models.fingerprint import model_hash
from atlas_jax.models.folder_config import (
    CONFIG_FILE,
    WITHOUT_EXPECTS,
    FolderConfig,
    check_has,
    deltas_of,
    read_folder_config,
    verified,
    write_folder_config,
)
from atlas_jax.models.partial import Base, given, over, tokenizer_on

_LAYER = re.compile(r"(encoder|decoder|query_encoder|passage_encoder)/layers_(\d+)/")
_DEPTHS = {
    "num_layers": "encoder", "num_encoder_layers": "encoder", "num_decoder_layers": "decoder",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """One model of a folder: its config fields, float32 parameters and tokenizer.

    Attributes:
      deltas: fields of the `DeltaConfig` of adapters or LoRA among the parameters, by path.
      base: to write the given parameters alone, on top of this model's; read parameters are whole.
    """

    config: dict[str, Any]
    params: Any
    tokenizer: Tokenizer
    deltas: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    base: Base | None = None


def save_model(
    directory: str | Path,
    parts: Mapping[str, ModelPart],
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    expects: Expects = NOTHING,
) -> None:
    """Write a model folder, atomically; a folder already there is replaced.

    The folder holds `config.json` (configs, `expects`, `about`, SHA-256 of every other file) and,
    for each part, `<part>.safetensors` and `<part>_tokenizer.json`; a part with a base has the
    base's tokenizer, and no file of its own.

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
                if part.base is None:
                    part.tokenizer.save(folder / f"{name}_tokenizer.json")
            write_folder_config(
                folder,
                {name: part.config for name, part in parts.items()},
                about,
                expects,
                deltas={path: f for part in parts.values() for path, f in part.deltas.items()},
                bases={n: dataclasses.asdict(p.base) for n, p in parts.items() if p.base},
            )
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
        copy_files(Path(name), as_path(directory), last=CONFIG_FILE)


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
    config = read_folder_config(folder)
    parts = {}
    for name, fields in config.models.items():
        if name in config.bases or deltas_of(name, config):
            raise UserError(
                f"model folder {folder}: its {name} has adapters or LoRA or stands on another "
                "folder, and only a plain one will do here; `atlas_jax.load(...).save(folder, "
                "merge=True)` makes one where it can"
            )
        state = f"{name}_optimizer.safetensors"
        parts[name] = FolderPart(
            config=fields,
            weights=verified(folder, f"{name}.safetensors", config),
            tokenizer=verified(folder, f"{name}_tokenizer.json", config),
            optimizer=verified(folder, state, config) if state in config.sha256 else None,
        )
    return parts


def load_model(
    directory: str | Path,
    names: tuple[str, ...] = (),
    bases: Mapping[str, str] | None = None,
) -> dict[str, ModelPart]:
    """Read a model folder, all parts or those named, and verify every file it reads.

    Args:
      bases: by part, where the base of a partial one lies now; else where it lay when it was made.

    Returns:
      Parts with float32 numpy parameters, those of a partial one on top of its base's.

    Raises:
      UserError: no such folder, no such part, a file missing or not the one that was
        saved (its SHA-256 differs), or a parameter that is not finite; a base that is absent or
        another one (both are named).
    """
    folder = local_folder(str(directory))
    config = read_folder_config(folder)
    wanted = names or tuple(config.models)
    for name in wanted:
        check_has(folder, name, config)
    return {name: _load_part(folder, name, config, (bases or {}).get(name, "")) for name in wanted}


def load_expects(directory: str | Path) -> Expects:
    """What the models of a folder expect to read; of an older folder, nothing.

    Raises:
      UserError: no such folder, or its config is damaged.
    """
    folder = as_path(directory)  # in a bucket, too, only this one file is read
    config = read_folder_config(folder)
    if config.format == WITHOUT_EXPECTS:
        return NOTHING
    return from_json(config.expects, f"{folder / CONFIG_FILE}: expects")


def load_config(directory: str | Path, name: str) -> dict[str, Any]:
    """The config fields of one model of a folder, without its parameters.

    Raises:
      UserError: no such folder, or no such part.
    """
    folder = as_path(directory)  # in a bucket, too, only this one file is read
    config = read_folder_config(folder)
    check_has(folder, name, config)
    return dict(config.models[name])


def load_deltas(directory: str | Path, name: str) -> dict[str, dict[str, Any]]:
    """Fields of the configs of one model's adapters and LoRA, by path, without its parameters.

    Raises:
      UserError: no such folder, or no such part.
    """
    config = read_folder_config(as_path(directory))
    check_has(as_path(directory), name, config)
    return deltas_of(name, config)


def read_about(directory: str | Path) -> dict[str, Any]:
    """What a model folder says for people: its run, its steps.

    Raises:
      UserError: no such folder.
    """
    return read_folder_config(as_path(directory)).about


def partial_parts(folders: Mapping[str, str]) -> list[str]:
    """Of folders by part, the parts that stand on a base.

    Raises:
      UserError: no such folder.
    """
    found = {name: read_folder_config(as_path(place)) for name, place in folders.items()}
    return [name for name, config in found.items() if name in config.bases]


def load_tokenizer(directory: str | Path, name: str, base: str = "") -> Tokenizer:
    """Read one model's tokenizer from a model folder, verified, without its parameters.

    Args:
      directory: the folder.
      name: of the model.
      base: where the base of a partial model lies now, as in `load_model`.

    Raises:
      UserError: as `load_model`.
    """
    folder = as_path(directory)  # in a bucket, too, only these two files are read
    config = read_folder_config(folder)
    check_has(folder, name, config)
    if name not in config.bases:
        return Tokenizer.from_file(verified(folder, f"{name}_tokenizer.json", config))
    below = config.bases[name]
    with _of_base(folder, name, below, base):
        return tokenizer_on(name, below, load_tokenizer(base or below.folder, below.part))


def _load_part(folder: Path, name: str, config: FolderConfig, base: str) -> ModelPart:
    fields, where = config.models[name], f"{folder / CONFIG_FILE}: models.{name}"
    params = _own_params(folder, name, config)
    if name in config.bases:
        params, tokenizer = _on_base(folder, name, config, base, params)
    elif base:
        raise UserError(f"model folder {folder}: its {name} is whole and stands on no base")
    else:
        tokenizer = Tokenizer.from_file(verified(folder, f"{name}_tokenizer.json", config))
    check_depth(fields, traverse_util.flatten_dict(params, sep="/"), where)
    return ModelPart(fields, params, tokenizer, deltas_of(name, config))


def _on_base(
    folder: Path, name: str, config: FolderConfig, place: str, own: Params
) -> tuple[Params, Tokenizer]:
    """A partial model's parameters and tokenizer, whole.

    Raises:
      UserError: the base is absent or another one.
    """
    base = config.bases[name]
    with _of_base(folder, name, base, place):
        found = load_model(place or base.folder, (base.part,))[base.part]
    present = model_hash(found.params, found.tokenizer)
    if present != base.fingerprint:
        raise UserError(
            f"model folder {folder}: its {name} stands on a {base.part} with the fingerprint "
            f"{base.fingerprint[:12]}; {place or base.folder} holds {present[:12]}"
        )
    below = given(name, config.models[name], base.part, found.params, found.tokenizer.eos_id)
    return over(below, own), tokenizer_on(name, base, found.tokenizer)


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """What a folder itself has of a model: all of it, or what stands on a base.

    Attributes:
      config: its config's fields.
      params: float32 numpy parameters.
      deltas, base: as in `FolderConfig`.
    """

    config: dict[str, Any]
    params: Params
    deltas: dict[str, dict[str, Any]]
    base: Base | None


def load_own(directory: str | Path) -> dict[str, OwnPart]:
    """Read a model folder without what it stands on.

    Raises:
      UserError: as `load_model`.
    """
    folder = local_folder(str(directory))
    config = read_folder_config(folder)
    return {
        name: OwnPart(
            fields, _own_params(folder, name, config), deltas_of(name, config),
            config.bases.get(name),
        )
        for name, fields in config.models.items()
    }  # fmt: skip


def _own_params(folder: Path, name: str, config: FolderConfig) -> Params:
    arrays = read_arrays(verified(folder, f"{name}.safetensors", config))
    flat = {key: array.astype(np.float32, copy=False) for key, array in arrays.items()}
    params: Params = traverse_util.unflatten_dict(flat, sep="/")
    return params


@contextlib.contextmanager
def _of_base(folder: Path, name: str, base: Base, place: str) -> Iterator[None]:
    """Say whose base it is that cannot be read."""
    try:
        if not (place or base.folder):
            raise UserError("nobody said where that is")
        yield
    except UserError as error:
        raise UserError(
            f"model folder {folder} holds a part of its {name} alone, on top of a {base.part} "
            f"({base.fingerprint[:12]}): {error}; bind ModelConfig.{name}_base to the folder "
            "that has it"
        ) from error


def base_of(directory: str | Path, name: str, place: str = "") -> tuple[Base, list[str]]:
    """What a model that is trained on top of a folder's stands on.

    Args:
      directory: the folder.
      name: of the model.
      place: where the base of a partial one lies now, as in `load_model`.

    Returns:
      The base, and the paths that a partial model of the folder has beyond it: two such models are
      not stacked, so what stands on a partial one holds these, too.

    Raises:
      UserError: as `load_model`.
    """
    folder = local_folder(str(directory))
    config = read_folder_config(folder)
    check_has(folder, name, config)
    if name in config.bases:
        own = read_file(verified(folder, f"{name}.safetensors", config))
        base = config.bases[name]
        return dataclasses.replace(base, folder=_absolute(place or base.folder)), list(own)
    part = load_model(directory, (name,))[name]
    return Base(model_hash(part.params, part.tokenizer), _absolute(directory), name), []


def _absolute(directory: str | Path) -> str:
    return str(directory) if is_remote(directory) else str(Path(directory).absolute())


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


def _flat_host_arrays(params: Any, dtype: str) -> dict[str, np.ndarray]:
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    flat = traverse_util.flatten_dict(multihost.to_host(params), sep="/")
    # Not `ascontiguousarray`, which makes a list of a single number.
    return {name: np.asarray(value, dtype=target, order="C") for name, value in flat.items()}
