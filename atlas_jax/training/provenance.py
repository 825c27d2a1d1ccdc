"""What a run was made with and whether it went on as it began.

A checkpoint notes what decides the order of the records, and a resumed run has to agree.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import as_path

_ENDS = 1 << 20  # bytes of a file's beginning and end that are hashed: it may be of any size


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
    """Refuse to go on with records in another order than the run had.

    Args:
      saved: settings by binding, as the checkpoint notes them; None in one of an older version.
      present: the same of this run.
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
    """Refuse to call a run trained that has left out every step.

    Raises:
      UserError: it has.
    """
    if steps and skipped >= steps:
        raise UserError(
            f"every one of the {steps} steps was skipped: loss or gradient was never finite, so "
            "nothing was learnt and no final model is written; look for NaN or infinite numbers in "
            "the initial checkpoint, or lower the learning rate"
        )


def _content(value: Any) -> Any:
    """What of a setting counts: the hash of a file, which may have been renamed."""
    return value.rpartition(", ")[2] if isinstance(value, str) else value
