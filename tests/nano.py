"""Where the shipped nano pair lies."""

from pathlib import Path

import atlas_jax

NANO = Path(atlas_jax.__file__).parent / "checkpoints" / "nano"
