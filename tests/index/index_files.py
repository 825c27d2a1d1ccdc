"""The files of a saved index, for tests."""

from pathlib import Path

import numpy as np

from atlas_jax.index.saved import open_index


def index_bytes(index: Path) -> dict[str, bytes]:
    """Each file of the index's arrays, by its name below the folder whose name is random."""
    files = (path for path in index.glob("embeddings-*/**/*") if path.is_file())
    return {"/".join(path.relative_to(index).parts[1:]): path.read_bytes() for path in files}


def scales_of(index: Path) -> np.ndarray:
    """The scales of an int8 index."""
    return np.asarray(open_index(index).embeddings_ne.scales_n)
