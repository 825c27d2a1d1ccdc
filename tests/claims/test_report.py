"""Table, figure, and what is kept of earlier calls."""

import dataclasses

import pytest
from matplotlib import image

from atlas_jax.claims.figure import write_figure
from atlas_jax.claims.pairs import MINI, NANO
from atlas_jax.claims.results import Measured, Results, merged, read, write
from atlas_jax.claims.rows import Claim, Group, Row
from atlas_jax.claims.table import page
from atlas_jax.core.errors import UserError


def _row(name, **fields):
    return Row(name, lambda bench, seed: None, **fields)


GROUPS = (
    Group(
        "first", "First question", "A paper, section 1", ("exact_match", "recall@5"),
        (_row("plain"), _row("better"), _row("other", reads={"exact_match": "special"})),
        (Claim("Better is better", "better", "plain"),
         Claim("Other is like plain", "other", "plain", "alike")),
    ),
    Group(
        "second", "Second question", "A paper, section 2", ("accuracy",),
        (_row("here"), _row("there", needs="squad_open")),
        (Claim("There beats here", "there", "here"),),
    ),
)  # fmt: skip


def _measured(*values, name="exact_match", **others):
    return {s: Measured(f"key{s}", {name: v, **others}) for s, v in enumerate(values)}


RESULTS = Results(
    checkpoint="abc",
    questions=200,
    measured={
        "first/plain": _measured(0.10, 0.12, 0.14, **{"recall@5": 0.5}),
        "first/better": _measured(0.20, 0.22, 0.24),
        "first/other": _measured(0.02, 0.02, 0.02, name="special"),
        "second/here": _measured(0.4, name="accuracy"),
    },
    versions={"jax": "1.2"},
)


def test_the_table_has_means_spreads_verdicts_and_what_is_missing():
    text = page(GROUPS, RESULTS, MINI)
    assert "| plain | 3 | 12.0 ± 2.0 | 50.0 ± 0.0 |" in text
    assert "| better | 3 | 22.0 ± 2.0 | – |" in text
    assert "| other | 3 | 2.0 ± 0.0 | – |" in text
    assert "| Better is better | better | more than plain | +10.0 | 2.0 | **shown** |" in text
    assert "| Other is like plain | other | like plain | -10.0 | 1.4 | **not shown** |" in text
    assert "| here | 1 | 40.0 |" in text
    assert "| there | not run (needs `squad_open` in `--data`) |  |" in text
    assert "| There beats here | there | more than here |  |  | **not run** |" in text
    assert "Of 3 comparisons: 1 shown, 1 not shown, 0 opposite, 0 one seed, 1 not run." in text
    assert "* first: Other is like plain (`other` against `plain`: not shown)" in text
    assert "At most 200 questions a row; seeds 0, 1, 2; checkpoint `abc`; jax 1.2." in text
    assert "](claims.png)" in text


def test_every_line_of_a_table_has_as_many_cells():
    lines = page(GROUPS, RESULTS, MINI).splitlines()
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    for table in filter(None, (t.strip() for t in tables)):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_figure_is_a_picture_even_where_nothing_has_run(tmp_path):
    nothing = dataclasses.replace(RESULTS, measured={})
    for name, results in (("all", RESULTS), ("nothing", nothing)):
        write_figure(tmp_path / f"{name}.png", GROUPS, results, NANO)
    full, empty = (image.imread(tmp_path / f"{name}.png") for name in ("all", "nothing"))
    assert full.shape[1] == 12 * 160
    assert (full[..., :3] < 0.7).any(axis=2).sum() > 2 * (empty[..., :3] < 0.7).any(axis=2).sum()


def test_results_come_back_from_their_file(tmp_path):
    write(tmp_path / "claims.json", RESULTS)
    assert read(tmp_path / "claims.json") == RESULTS
    assert read(tmp_path / "none.json") is None


def test_earlier_results_stay_only_while_they_are_of_the_same_runs():
    present = dataclasses.replace(RESULTS, measured={"first/plain": _measured(0.5)})
    keys = {"first/plain": {0: "key0", 1: "key1", 2: "new"}, "first/better": {0: "key0"}}
    found = merged(RESULTS, present, keys).measured
    assert {s: one.scores["exact_match"] for s, one in found["first/plain"].items()} == {
        0: 0.5,  # measured now
        1: 0.12,  # of the same run
    }
    assert set(found["first/better"]) == {0, 1, 2}
    assert set(found["second/here"]) == {0}  # its data is not here, so its key is not known
    for changed in ({"checkpoint": "other"}, {"questions": 100}):
        now = dataclasses.replace(present, **changed)
        assert merged(RESULTS, now, keys).measured == present.measured
    assert merged(None, present, keys) == present


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "claims.json: expected an object, got a list"),
        ('{"checkpoint": 1}', "checkpoint: expected a text, got a whole number"),
        ('{"checkpoint": "a", "questions": 1, "versions": {}}', "the field measured is missing"),
        ('{"checkpoint": "a", "ques', "claims.json: cut off"),
    ],
)
def test_results_that_are_damaged_are_told(text, message, tmp_path):
    path = tmp_path / "claims.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)
