"""The files of a saved index, for tests."""

from pathlib import Path


def index_bytes(index: Path) -> dict[str, bytes]:
    """Each file of the index's arrays, by its name below the folder whose name is random."""
    files = (path for path in index.glob("embeddings-*/**/*") if path.is_file())
    return {"/".join(path.relative_to(index).parts[1:]): path.read_bytes() for path in files}
