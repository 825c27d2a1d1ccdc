"""Checkpoints of a run (Orbax, nowhere else) and model folders (safetensors).

A **checkpoint** is everything a killed run needs to repeat itself bit for bit: the whole
train state and small notes (data order, index version). A **model folder** is what a run
leaves behind for others: parameters, configs and tokenizers, each file with its SHA-256.

Both appear at once or not at all: they are written under a temporary name and renamed.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from atlas_jax.core import multihost
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import (
    as_path,
    copy_files,
    file_sha256,
    is_remote,
    local_folder,
    open_to_all,
    remove_tree,
)
from atlas_jax.core.tokenizer import Tokenizer
from atlas_jax.training.config import CheckpointConfig

FOLDER_FORMAT = 1
_CONFIG_FILE = "config.json"
_DELETED = "deleted"  # where old checkpoints go at once, so that a kill leaves no half of one


def describe(tree: Any) -> dict[str, str]:
    """Path -> "float32[512,256]" of every array of a pytree, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in leaves
    }


def first_difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Name the first array in which two descriptions differ, parameters before the rest."""
    names = [*expected, *(name for name in found if name not in expected)]
    for name in sorted(names, key=lambda name: not name.startswith("params")):
        there, here = found.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            return f"{name} is {there} there and {here} here"
    return None


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its step, the train state and the notes saved with it."""

    step: int
    state: Any
    notes: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, newest `config.keep` of them.

    `save` copies the state to the host and returns; the files are written while training goes
    on. A checkpoint counts once it is complete, and at most one is being written.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig) -> None:
        """Open (or make) `directory` and clear away what an interrupted save left there."""
        self.directory = as_path(directory)
        if not is_remote(directory):
            self.directory = self.directory.absolute()
        self._writing: int | None = None
        self._clear_deleted()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                todelete_subdir=_DELETED,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; waits for one that is being written.

        Raises:
          UserError: that one could not be written; the earlier ones are untouched.
        """
        self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
          UserError: it could not be written; the earlier ones are untouched.
        """
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax lets errors of several libraries through.
            raise self._unwritten(step, error) from error
        self._clear_deleted()

    def save(self, step: int, state: Any, notes: Mapping[str, Any], index: Any = None) -> None:
        """Begin to write a checkpoint; older ones beyond `keep` go once it is complete.

        Waits for the one before. The arrays may be donated or changed as soon as this returns.

        Args:
          step: number of finished steps; names the checkpoint.
          state: pytree of arrays (sharded ones are written by their hosts).
          notes: JSON values to find again in `Restored.notes`.
          index: embeddings to find again by `restore_index`; None = they are kept elsewhere.

        Raises:
          UserError: this checkpoint or the one before could not be written; the earlier ones
            are untouched.
        """
        if step in self.steps():
            return
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state),
            "notes": ocp.args.JsonSave({"arrays": describe(state), "notes": dict(notes)}),
        }
        if index is not None:
            items["index"] = ocp.args.StandardSave({"embeddings_ne": index})
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._unwritten(step, error) from error
        self._writing = step

    def read_notes(self, step: int) -> dict[str, Any]:
        """The notes of one checkpoint, without its arrays."""
        return self._read_json(step)["notes"]

    def restore(self, template: Any, step: int | None = None) -> Restored | None:
        """Read a checkpoint (the newest by default) into the form of `template`.

        Args:
          template: pytree of arrays or ShapeDtypeStructs; shardings, if they carry any,
            decide where the restored arrays lie.

        Returns:
          None when there is no checkpoint yet.

        Raises:
          UserError: the checkpoint is of another model (the first array that differs is
            named) or cannot be read.
        """
        steps = self.steps()
        if not steps:
            return None
        step = steps[-1] if step is None else step
        saved = self._read_json(step)
        difference = first_difference(saved["arrays"], describe(template))
        if difference:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another model: {difference}. "
                "Use the configuration it was made with, or another TrainConfig.model_dir"
            )
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            state = self._manager.restore(step, args=items).state
        except Exception as error:
            raise self._unreadable(step, error) from error
        return Restored(step=step, state=state, notes=saved["notes"])

    def restore_index(self, step: int, template: Any) -> Any:
        """The embeddings of one checkpoint, laid out as `template` says.

        Rows of the template beyond those saved are zero, and such rows that are saved are left
        out: both only pad the index to its devices, of which there may be others now.

        Raises:
          UserError: they cannot be read.
        """
        restore = ocp.args.StandardRestore({"embeddings_ne": template}, strict=False)
        try:
            items = ocp.args.Composite(index=restore)
            return self._manager.restore(step, args=items).index["embeddings_ne"]
        except Exception as error:
            raise self._unreadable(step, error) from error

    def close(self) -> None:
        """Wait for the checkpoint that is being written, then release Orbax's threads.

        Raises:
          UserError: it could not be written.
        """
        self.wait()
        self._manager.close()

    def _clear_deleted(self) -> None:
        """Remove the checkpoints that Orbax has put aside; of a bucket it deletes them itself."""
        if multihost.is_first() and not is_remote(self.directory):
            remove_tree(self.directory / _DELETED)

    def _unreadable(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"checkpoint {self.directory / str(step)} cannot be read ({_one_line(error)}); "
            "remove that folder to go on from an earlier one"
        )

    def _read_json(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(notes=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=items).notes
        except Exception as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)} cannot be read ({_one_line(error)})"
            ) from error

    def _unwritten(self, step: int, error: BaseException) -> UserError:
        """Clear away what there is of a checkpoint, and say what is left."""
        for leftover in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            remove_tree(leftover)
        self._manager.reload()
        before = [saved for saved in self._manager.all_steps() if saved != step]
        usable = f"checkpoint {max(before)} is untouched" if before else "there is no earlier one"
        return UserError(
            f"checkpoint {step} could not be written to {self.directory} "
            f"({_one_line(error)}); {usable}. Make room and start the same command again"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- model folders ---------------------------------------------------------------------


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
) -> None:
    """Write a model folder, atomically; a folder already there is replaced.

    The folder holds `config.json` (configs, `about`, SHA-256 of every other file) and,
    for each part, `<part>.safetensors` and `<part>_tokenizer.json`.

    Args:
      parts: e.g. {"reader": ..., "retriever": ...}; params are nested dicts of arrays.
      dtype: 'float32' or 'bfloat16', in which parameters are stored.
      about: JSON values for people (the run, its steps).

    Raises:
      UserError: the folder could not be written; an earlier one is untouched.
    """
    # Every host takes part in gathering sharded parameters; only the first one writes.
    arrays = {name: _flat_host_arrays(part.params, dtype) for name, part in parts.items()}
    try:
        if multihost.is_first():
            _write_model(directory, parts, arrays, about)
    finally:
        multihost.barrier("model folder")  # nobody ends while it is being written


def _write_model(
    directory: str | Path,
    parts: Mapping[str, ModelPart],
    arrays: Mapping[str, dict[str, np.ndarray]],
    about: Mapping[str, Any] | None,
) -> None:
    try:
        with _new_folder(directory) as folder:
            for name, part in parts.items():
                weights = folder / f"{name}.safetensors"
                save_file(arrays[name], weights)
                open_to_all(weights)
                part.tokenizer.save(folder / f"{name}_tokenizer.json")
            write_folder_config(folder, {n: part.config for n, part in parts.items()}, about)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model folder {directory} could not be written: {_one_line(error)}"
        ) from error


@contextlib.contextmanager
def _new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder on the disk that takes its place when the block succeeds, also in a bucket."""
    if not is_remote(directory):
        with replaced_directory(Path(directory)) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="atlas-jax-") as name:
        yield Path(name)
        copy_files(Path(name), as_path(directory), last=_CONFIG_FILE)


def write_folder_config(
    folder: Path, configs: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> None:
    """Write the `config.json` of a model folder whose other files are there already.

    Args:
      configs: the config fields of each part.
      about: JSON values for people.
    """
    config = {
        "format": FOLDER_FORMAT,
        "models": dict(configs),
        "about": dict(about or {}),
        "sha256": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@dataclasses.dataclass(frozen=True)
class FolderPart:
    """One model of a folder by its files, verified and not read.

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
    """The parts of a model folder, for who reads arrays one at a time.

    Raises:
      UserError: as `load_model`.
    """
    folder = local_folder(str(directory))
    config = _read_folder_config(folder)
    parts = {}
    for name, fields in config["models"].items():
        state = f"{name}_optimizer.safetensors"
        parts[name] = FolderPart(
            config=fields,
            weights=_verified(folder, f"{name}.safetensors", config),
            tokenizer=_verified(folder, f"{name}_tokenizer.json", config),
            optimizer=_verified(folder, state, config) if state in config["sha256"] else None,
        )
    return parts


def load_model(directory: str | Path, names: tuple[str, ...] = ()) -> dict[str, ModelPart]:
    """Read a model folder, all parts or those named, and verify every file it reads.

    Returns:
      Parts with float32 numpy parameters.

    Raises:
      UserError: no such folder, no such part, a file missing or not the one that was
        saved (its SHA-256 differs).
    """
    folder = local_folder(str(directory))
    config = _read_folder_config(folder)
    wanted = names or tuple(config["models"])
    for name in wanted:
        _check_has(folder, name, config)
    return {name: _load_part(folder, name, config) for name in wanted}


def load_tokenizer(directory: str | Path, name: str) -> Tokenizer:
    """Read one model's tokenizer from a model folder, verified, without its parameters.

    Raises:
      UserError: as `load_model`.
    """
    folder = local_folder(str(directory))
    config = _read_folder_config(folder)
    _check_has(folder, name, config)
    return Tokenizer.from_file(_verified(folder, f"{name}_tokenizer.json", config))


def _load_part(folder: Path, name: str, config: dict[str, Any]) -> ModelPart:
    weights = load_file(_verified(folder, f"{name}.safetensors", config))
    flat = {key: value.astype(np.float32) for key, value in weights.items()}
    return ModelPart(
        config=config["models"][name],
        params=traverse_util.unflatten_dict(flat, sep="/"),
        tokenizer=Tokenizer.from_file(_verified(folder, f"{name}_tokenizer.json", config)),
    )


def _verified(folder: Path, name: str, config: dict[str, Any]) -> Path:
    file = folder / name
    if not file.is_file():
        raise UserError(f"model folder {folder} lacks {name}")
    found, expected = file_sha256(file), config["sha256"].get(name)
    if found != expected:
        raise UserError(
            f"{file} is not the file that was saved: its SHA-256 is {found[:12]}, "
            f"{_CONFIG_FILE} says {str(expected)[:12]}; copy the folder again"
        )
    return file


def _check_has(folder: Path, name: str, config: dict[str, Any]) -> None:
    if name not in config["models"]:
        has = ", ".join(config["models"])
        raise UserError(f"model folder {folder} has no {name}; it has {has}")


def _read_folder_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a model folder: it has no {_CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict) or config.get("format") != FOLDER_FORMAT:
        raise UserError(f"{path}: expected a model folder's config of format {FOLDER_FORMAT}")
    return config


def check_params(params: Any, expected: Any, source: str | Path) -> None:
    """Refuse parameters that do not fit a model.

    Args:
      params, expected: trees of arrays or ShapeDtypeStructs.
      source: named in the error: where `params` came from.

    Raises:
      UserError: names the first parameter that differs.
    """
    difference = first_difference(describe(params), describe(expected))
    if difference:
        raise UserError(f"{source} is a checkpoint of another model: parameter {difference}")


def _flat_host_arrays(params: Any, dtype: str) -> dict[str, np.ndarray]:
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    flat = traverse_util.flatten_dict(multihost.to_host(params), sep="/")
    return {name: np.ascontiguousarray(value, dtype=target) for name, value in flat.items()}


@contextlib.contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """A fresh folder beside `directory` that takes its place when the block succeeds.

    After an error (or a kill) whatever was at `directory` is still there.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        work.chmod(0o755)  # mkdtemp makes it private
        yield work
        old = work.with_name(work.name + ".old")
        if directory.exists():
            os.replace(directory, old)
        os.replace(work, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
