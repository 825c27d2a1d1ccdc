"""Answers score what the published scripts of SQuAD and KILT give them, tricky ones too."""

import json

import pytest

from atlas_jax.tasks import kilt_scores, metrics
from atlas_jax.tasks.base import Example, Prediction
from atlas_jax.tasks.kilt import KILTTask
from tests.goldens.make_answer_score_goldens import EXPECTED, PAIRS, rows

GOLDEN = json.loads(EXPECTED.read_text(encoding="utf-8"))
pairs = pytest.mark.parametrize("row", GOLDEN["pairs"])


def test_the_goldens_are_of_these_texts():
    assert [(row["prediction"], row["answer"]) for row in GOLDEN["pairs"]] == PAIRS
    assert GOLDEN["rows"] == rows()
    assert GOLDEN["made_by"]["rouge"] == "1.0.1"


@pairs
def test_exact_match_and_f1_are_those_of_squads_script(row):
    texts = row["prediction"], row["answer"]
    assert metrics.exact_match(*texts) == row["squad_exact_match"]
    if any(map(metrics.normalize_answer, texts)):
        assert metrics.f1(*texts) == pytest.approx(row["squad_f1"], abs=1e-12)
    else:  # the one case in which SQuAD 1.1's script and ours part, see `metrics.f1`
        assert (metrics.f1(*texts), row["squad_f1"]) == (1, 0)


@pairs
def test_each_score_is_that_of_kilts_script(row):
    texts = row["prediction"], row["answer"]
    assert metrics.exact_match(*texts) == row["kilt_exact_match"]
    assert kilt_scores.f1(*texts) == pytest.approx(row["kilt_f1"], abs=1e-12)
    assert kilt_scores.rouge_l(*texts) == pytest.approx(row["kilt_rougeL"], abs=1e-12)


def test_a_whole_file_scores_what_kilts_script_gives():
    predictions = []
    for row in GOLDEN["rows"]:
        evidence = [{"wikipedia_id": page} for page in row["gold"]]
        answers = tuple(answer.strip() for answer in row["answers"])
        meta = {"gold_output": [{"provenance": evidence}]}
        found = [{"id": f"{page}:0", "title": ""} for page in row["pages"]]
        example = Example(row["id"], "q", "q", answers=answers, meta=meta)
        predictions.append(Prediction(example, row["guess"], found))
    scores = KILTTask().evaluate(predictions)
    names = {"accuracy": "accuracy", "em": "exact_match", "f1": "f1", "rougel": "rougeL"}
    for theirs, ours in names.items():
        downstream, kilt = GOLDEN["scores"]["downstream"], GOLDEN["scores"]["kilt"]
        assert scores[ours] == pytest.approx(downstream[theirs], abs=1e-12)
        assert scores[f"kilt_{ours}"] == pytest.approx(kilt[f"KILT-{theirs}"], abs=1e-12)
        assert 0 < scores[f"kilt_{ours}"] < scores[ours] < 1
