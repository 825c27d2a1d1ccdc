"""Make answer_scores.json: what the published scripts of SQuAD and KILT give tricky answers.

    pip install rouge==1.0.1 nltk
    python tests/goldens/make_answer_score_goldens.py evaluate-v1.1.py path/to/KILT

The first argument is SQuAD's evaluation script, the second a checkout of facebookresearch/KILT
(commit 2664322), whose `kilt/eval_downstream.py` scores with the package `rouge`. What this writes
holds the SHA-256 of the scripts and the version of the package; tests/tasks/test_answer_scores.py
reads it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

EXPECTED = Path(__file__).parent / "answer_scores.json"

# (prediction, answer)
PAIRS = [
    ("the Nile", "Nile"), ("The  Nile!", "nile"), ("river Nile", "the Nile river"),
    ("an apple a day", "apple day"), ("Theatre", "the atre"), ("a", "the"), ("a", ""),
    ("", ""), ("", "London"), ("London", ""), ("...", ""), ("!?", "."), (" ", "a an the"),
    ("U.S.", "US"), ("U.S.A.", "U. S. A."), ("14,500 km", "14500 km"), ("3.14", "314"),
    ("1,000", "1000"), ("$5.00", "5"), ("-7", "7"), ("2026", "in 2026"), ("ten", "10"),
    ("São Tomé", "sao tome"), ("São Tomé", "são tomé"), ("e\u0301t\u00e9", "\u00e9t\u00e9"),
    ("İstanbul", "istanbul"), ("STRASSE", "straße"), ("“quoted”", '"quoted"'),
    ("New–York", "New-York"), ("New-York", "New York"), ("it’s", "it's"), ("it's", "its"),
    ("a_b", "ab"), ("東京", "東京"), ("東京 都", "東京"), ("hard\u00a0blank", "hard blank"),
    ("tab\tand\nline", "tab and line"), ("b b c", "b c c"), ("x y x y", "y x y x"),
    ("The cat.", "the cat"), ("the cat", "The Cat"), ("cat.", "cat"), ("Cat sat. Dog ran.",
    "Dog ran. Cat sat."), ("One two. Three four.", "One two three four"),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"), ("a.b.c", "a b c"),
    ("first . . second", "first. second"), ("x. ", "x"), ("the the the", "the"),
    ("a b c d e", "e d c b a"), ("a x b y c", "a b c. c b a"), ("p q r s", "q p s r"),
    ("It is old.  It is tall! Is it new?", "It is tall! It was old. Is it?"),
    ("no, not at all", "No"), ("No", "no."), ("e.g. this", "for example this"),
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Gold lines of KILT and the answers and pages given, for the scores of a whole file."""
    return [
        {"id": "1", "answers": ["the Nile", "Nile."], "gold": ["7"], "guess": "Nile",
         "pages": ["7", "8"]},
        {"id": "2", "answers": ["The river Nile. It is long."], "gold": ["7", "9"],
         "guess": "the Nile. It is very long", "pages": ["9", "7", "1"]},
        {"id": "3", "answers": ["1,000 km", "a thousand"], "gold": ["3"], "guess": "1000 km",
         "pages": ["4", "3"]},
        {"id": "4", "answers": ["the"], "gold": ["5"], "guess": "a", "pages": ["5"]},
        {"id": "5", "answers": ["Élan vital", " Bergson "], "gold": ["6"], "guess": "bergson",
         "pages": ["6"]},
        {"id": "6", "answers": ["yes"], "gold": ["2"], "guess": "no", "pages": ["2"]},
        {"id": "7", "answers": ["SUPPORTS"], "gold": ["1"], "guess": " SUPPORTS", "pages": ["1"]},
        {"id": "8", "answers": ["SUPPORTS"], "gold": ["1"], "guess": "SUPPORTS", "pages": ["2"]},
        {"id": "9", "answers": ["the"], "gold": ["1"], "guess": " ", "pages": ["1"]},
    ]  # fmt: skip


def main(squad_script: str, kilt_folder: str) -> None:
    """Score and record."""
    sys.path.insert(0, kilt_folder)
    squad = _module("squad", Path(squad_script))
    downstream = Path(kilt_folder) / "kilt" / "eval_downstream.py"
    kilt = importlib.import_module("kilt.eval_downstream")
    result = {
        "made_by": {
            "rouge": importlib.metadata.version("rouge"),
            "evaluate-v1.1.py": _sha256(Path(squad_script)),
            "eval_downstream.py": _sha256(downstream),
        },
        "pairs": [
            {
                "prediction": prediction,
                "answer": answer,
                "squad_exact_match": float(squad.exact_match_score(prediction, answer)),
                "squad_f1": float(squad.f1_score(prediction, answer)),
                "kilt_exact_match": float(kilt._exact_match_score(prediction, answer)),
                "kilt_f1": float(kilt._f1_score(prediction, answer)),
                "kilt_rougeL": float(kilt._rougel_score(prediction, answer)),
            }
            for prediction, answer in PAIRS
        ],
        "rows": rows(),
        "scores": kilt._calculate_metrics(*_files()),
    }
    EXPECTED.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _files() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`rows` as a gold and as a guess file of KILT."""
    gold, guess = [], []
    for row in rows():
        evidence = [{"wikipedia_id": page} for page in row["gold"]]
        outputs = [{"answer": answer} for answer in row["answers"]]
        gold.append({"id": row["id"], "output": [*outputs, {"provenance": evidence}]})
        pages = [{"wikipedia_id": page} for page in row["pages"]]
        guess.append({"id": row["id"], "output": [{"answer": row["guess"], "provenance": pages}]})
    return gold, guess


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
