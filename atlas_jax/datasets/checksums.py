"""SHA-256 of published and prepared files: always noted, and verified if one is given."""

import json
import re
from pathlib import Path
from typing import Any

from atlas_jax.core import strict_json
from atlas_jax.core.errors import UserError
from atlas_jax.core.jsonl import atomic_text
from atlas_jax.core.paths import file_sha256, read_text

CHECKSUMS = "SHA256SUMS"  # beside the published files, as `sha256sum` writes it
NOTES = "prepared.json"  # beside the prepared files


def read_checksums(source: Path, given: str | Path = "") -> dict[str, str]:
    """File name below `source` -> SHA-256 in hexadecimal, from a file as `sha256sum` writes it.

    Args:
      source: the folder of published files.
      given: that file; "" = SHA256SUMS in `source`, if there is one.

    Raises:
      UserError: the file does not exist, or a line is not in the form of `sha256sum`.
    """
    path = Path(given) if given else source / CHECKSUMS
    if not given and not path.exists():
        return {}
    lines = read_text(path).splitlines()
    sums = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(\S.*)", line)
        if found is None:
            raise UserError(f"{path}:{number}: expected 64 hexadecimal digits, two blanks, a name")
        sums[found[2]] = found[1].lower()
    return sums


def verified(paths: list[Path], folder: Path, sums: dict[str, str]) -> dict[str, str]:
    """Name below `folder` -> SHA-256 of each file.

    Raises:
      UserError: a file has another SHA-256 than in `sums`.
    """
    found = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    for name, digest in found.items():
        if sums.get(name, digest) != digest:
            raise UserError(
                f"{folder / name}: its SHA-256 is {digest}, but {sums[name]} is asked for; "
                "download it again"
            )
    return found


def note(out: Path, name: str, fields: dict[str, Any]) -> None:
    """Add an entry about a prepared file to `out`/prepared.json.

    Raises:
      UserError: prepared.json exists and is not a JSON object.
    """
    notes = read_notes(out) | {name: fields}
    with atomic_text(out / NOTES) as file:
        json.dump(dict(sorted(notes.items())), file, indent=2)


def read_notes(out: Path) -> dict[str, Any]:
    """The entries of `note`: {name: {"rows", "sha256", "sources": {name: sha256}}}.

    Raises:
      UserError: the file exists and is not a JSON object.
    """
    path = out / NOTES
    if not path.exists():
        return {}
    try:
        notes: dict[str, Any] = strict_json.read(path, dict[str, dict[str, Any]])
    except UserError as error:
        raise UserError(f"{error}; remove it") from error
    return notes
