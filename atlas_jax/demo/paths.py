"""Where the demo finds what is shipped with the package, and how a command is told a path."""

import json
import re
from pathlib import Path

import atlas_jax
from atlas_jax.core.errors import UserError


def nano_checkpoint() -> Path:
    """Return the folder of the shipped nano model: reader, retriever and tokenizers.

    Raises:
      UserError: the installation lacks it.
    """
    folder = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the nano model is missing from {folder}: install the package from a whole clone, "
            "or name a model folder with --checkpoint"
        )
    return folder


def bind(name: str, path: Path) -> str:
    """A path as a binding, quoted where gin would not take it as a bare string."""
    text = path.as_posix()
    plain = "/" in text and re.fullmatch(r"[\w./-]+", text)
    return f"--gin.{name}={text if plain else json.dumps(text)}"
