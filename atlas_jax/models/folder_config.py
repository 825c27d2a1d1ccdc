"""What a model folder says of itself in its `config.json`, and whether its files are those."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_jax.core import strict_json
from atlas_jax.core.bounds import check_fields
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.errors import UserError
from atlas_jax.core.paths import check_fetched, check_name, file_sha256, kind_of
from atlas_jax.models.config import MODEL_CONFIGS
from atlas_jax.models.expects import NOTHING, Expects, to_json
from atlas_jax.models.partial import Base

FOLDER_FORMAT = 2
WITHOUT_EXPECTS = 1  # an older format, in which a folder does not say what its models expect
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """What `config.json` says: fields of the parts, SHA-256 of the other files, and `about`.

    Attributes:
      deltas: fields of the `DeltaConfig` of adapters or LoRA, by path, as in `Models.deltas`.
      bases: what each part stands on whose file holds a part of its parameters alone.
      expects: what the models expect to read, which `expects.from_json` checks.
    """

    format: int
    models: dict[str, Any]
    sha256: dict[str, str]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    deltas: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    bases: dict[str, Base] = dataclasses.field(default_factory=dict)
    expects: Any = None


def write_folder_config(
    folder: Path,
    configs: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    expects: Expects = NOTHING,
    **more: Mapping[str, Any],
) -> None:
    """Write the `config.json` of a model folder whose other files are there already.

    Args:
      folder: the folder.
      configs: the config fields of each part.
      about: JSON values for people.
      expects: what the models expect to read.
      **more: `deltas` and `bases`, see `FolderConfig`; left out where empty.
    """
    config: dict[str, Any] = {
        "format": FOLDER_FORMAT,
        "models": dict(configs),
        "expects": to_json(expects),
        "about": dict(about or {}),
        "sha256": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    }
    config |= {name: dict(value) for name, value in more.items() if value}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def deltas_of(name: str, config: FolderConfig) -> dict[str, dict[str, Any]]:
    """Adapters and LoRA of one model: fields of their configs, by path."""
    return {p: fields for p, fields in config.deltas.items() if p.partition("/")[0] == name}


def verified(folder: Path, name: str, config: FolderConfig) -> Path:
    """A file of the folder.

    Raises:
      UserError: it is absent, or not the one that was saved.
    """
    check_name(name)
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise UserError(f"model folder {folder} lacks {name}")
    check_fetched(file)
    found, expected = file_sha256(file), config.sha256.get(name)
    if found != expected:
        raise UserError(
            f"{file} is not the file that was saved: its SHA-256 is {found[:12]}, "
            f"{CONFIG_FILE} says {str(expected)[:12]}; copy the folder again"
        )
    return file


def check_has(folder: Path, name: str, config: FolderConfig) -> None:
    """Refuse a folder without this model.

    Raises:
      UserError: names those that it has.
    """
    if name not in config.models:
        has = ", ".join(config.models) or "none"
        raise UserError(f"model folder {folder} has no {name}; it has {has}")


def read_folder_config(folder: Path) -> FolderConfig:
    """The config, its types and those of the parts' fields checked.

    Raises:
      UserError: there is none, or it names the file and the field at fault.
    """
    path = folder / CONFIG_FILE
    if kind_of(path) == "nothing":
        raise UserError(f"{folder} is not a model folder: it has no {CONFIG_FILE}")
    found: dict[str, Any] = strict_json.read(path, dict[str, Any])
    if found.get("format") not in (WITHOUT_EXPECTS, FOLDER_FORMAT):
        raise UserError(
            f"{path}: expected a model folder's config of format {WITHOUT_EXPECTS} or "
            f"{FOLDER_FORMAT}"
        )
    config: FolderConfig = strict_json.convert(found, FolderConfig, str(path))
    for name, fields in config.models.items():
        strict_json.convert(fields, dict[str, Any], f"{path}: models.{name}")
        if name in MODEL_CONFIGS:
            check_fields(MODEL_CONFIGS[name], fields, f"{path}: models.{name}")
    for place, fields in config.deltas.items():
        check_fields(DeltaConfig, fields, f"{path}: deltas.{place}")
    return config
