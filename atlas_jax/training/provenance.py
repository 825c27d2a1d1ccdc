"""Check that a resumed run has the settings that it began with.

A checkpoint notes the settings that decide the order of the records. A resumed run must have the
same.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import as_path

_ENDS = 1 << 20  # bytes hashed at a file's beginning and end, since files can be very large


def file_mark(path: str | Path) -> str:
    """Identifies a file's content cheaply: its size and a hash of its beginning and its end."""
    file = as_path(path)
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode("ascii"))
    with file.open("rb") as content:
        digest.update(content.read(_ENDS))
        if size > _ENDS:
            content.seek(max(size - _ENDS, _ENDS))
            digest.update(content.read(_ENDS))
    return f"{file.name}, {size:,} bytes, {digest.hexdigest()[:12]}"


def check_resumed(saved: Mapping[str, Any] | None, present: Mapping[str, Any], run: str) -> None:
    """Refuse to resume a run if its records would come in another order.

    Args:
      saved: the checkpoint's settings by binding; None for a checkpoint of an older version.
      present: this run's settings.
      run: the run's directory, for the message.

    Raises:
      UserError: names the binding and both values.
    """
    for binding, value in present.items():
        before = (saved or {}).get(binding, value)
        if _content(before) != _content(value):
            raise UserError(
                f"{binding} = {value!r}, but the run in {run} was begun with {before!r}: records "
                "would come twice or not at all. Go on with what it was begun with, or begin "
                "another run in another model_dir"
            )


def check_learnt(steps: int, skipped: int) -> None:
    """Refuse to finish a run in which every step was skipped.

    Raises:
      UserError: every step was skipped.
    """
    if steps and skipped >= steps:
        raise UserError(
            f"every one of the {steps} steps was skipped: loss or gradient was never finite, so "
            "nothing was learnt and no final model is written; look for NaN or infinite numbers in "
            "the initial checkpoint, or lower the learning rate"
        )


def _content(value: Any) -> Any:
    """The part of a setting that counts: of a file its hash, since it may be renamed."""
    return value.rpartition(", ")[2] if isinstance(value, str) else value
