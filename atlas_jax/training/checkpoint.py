"""Checkpoints of a run. This is the only file that uses Orbax.

A checkpoint is everything a killed run needs to repeat itself bit for bit: the whole train state
and small notes (data order, index version). It is written under a temporary name and then renamed,
so it is never seen half-written.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

import orbax.checkpoint as ocp

from atlas_jax.core import bounds, multihost, strict_json
from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import (
    as_path,
    is_remote,
    remove_tree,
)
from atlas_jax.models.matching import describe, first_difference
from atlas_jax.training.config import CheckpointConfig

_DELETED = "deleted"  # old checkpoints are moved here in one step: a kill leaves none half-deleted


class _Rolling(TypedDict):
    next_row: bounds.Count
    dtype: str
    store_hash: str


class _IndexNotes(TypedDict, total=False):
    version: Required[bounds.Count]
    encoder_hash: Required[str]
    rolling: _Rolling
    whole_at: bounds.Count
    slices: bounds.Count


class _Notes(TypedDict, total=False):
    data: dict[str, Any]
    settings: dict[str, str | int]
    index: _IndexNotes | None


class _Saved(TypedDict):
    """The JSON beside the arrays: their shapes and types, and the run's own notes."""

    arrays: dict[str, str]
    notes: _Notes


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
        self._closed = False
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
          UserError: that one could not be written; the earlier ones are unchanged.
        """
        self.wait()
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
          UserError: it could not be written; the earlier ones are unchanged.
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
        """Begin to write a checkpoint; when it is complete, older ones beyond `keep` are deleted.

        Waits for the previous checkpoint. The arrays may be donated or changed after this returns.

        Args:
          step: number of finished steps; names the checkpoint.
          state: pytree of arrays (sharded ones are written by their hosts).
          notes: JSON values, which `Restored.notes` gives back.
          index: embeddings, which `restore_index` gives back; None = they are kept elsewhere.

        Raises:
          UserError: this checkpoint or the previous one could not be written; earlier ones are
            unchanged.
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
          template: pytree of arrays or ShapeDtypeStructs. Their shardings, if any, are those of
            the restored arrays.

        Returns:
          None when there is no checkpoint yet.

        Raises:
          UserError: the checkpoint is of another model (names the first array that differs), or
            it cannot be read.
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
        """The embeddings of one checkpoint, with the shape and sharding of `template`.

        An index has rows of padding, so that its rows divide over the devices. Another number of
        devices needs another number of such rows; they are then added or left out.

        Raises:
          UserError: they cannot be read.
        """
        restore = ocp.args.StandardRestore({"embeddings_ne": template}, strict=False)
        try:
            items = ocp.args.Composite(index=restore)
            return self._manager.restore(step, args=items).index["embeddings_ne"]
        except Exception as error:
            raise self._unreadable(step, error) from error

    def resume_data(self, batches: Any, restored: Restored) -> None:
        """Set an iterator of batches to the place where it was when the checkpoint was written.

        Raises:
          UserError: the checkpoint's notes are not those of such an iterator.
        """
        try:
            batches.set_state(restored.notes["data"])
        except Exception as error:  # Grain does not check the state that it is given
            raise self._unreadable(restored.step, error) from error

    def __enter__(self) -> "Checkpointer":
        """Begin a block; however it ends, no checkpoint is left half-written."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """`close`. If the block failed, an error of `close` is only printed."""
        try:
            self.close()
        except UserError as unwritten:
            if error is None:
                raise
            print(unwritten, file=sys.stderr)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, then release Orbax's threads.

        Raises:
          UserError: it could not be written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._manager.close()

    def _clear_deleted(self) -> None:
        """Remove the checkpoints that Orbax has put aside; in a bucket it deletes them itself."""
        if multihost.is_first() and not is_remote(self.directory):
            remove_tree(self.directory / _DELETED)

    def _unreadable(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"checkpoint {self.directory / str(step)} cannot be read ({one_line(error)}); "
            "remove that folder to go on from an earlier one"
        )

    def _read_json(self, step: int) -> Any:
        items = ocp.args.Composite(notes=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=items).notes
            strict_json.convert(found, _Saved, "its notes")
        except Exception as error:
            raise self._unreadable(step, error) from error
        return found

    def _unwritten(self, step: int, error: BaseException) -> UserError:
        """Remove an incomplete checkpoint; the error says which checkpoints are left."""
        for leftover in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            remove_tree(leftover)
        self._manager.reload()
        before = [saved for saved in self._manager.all_steps() if saved != step]
        usable = f"checkpoint {max(before)} is untouched" if before else "there is no earlier one"
        return UserError(
            f"checkpoint {step} could not be written to {self.directory} "
            f"({one_line(error)}); {usable}. Make room and start the same command again"
        )
