from atlas_jax.demo.factbook_passages import MAX_WORDS, passages_of, split_long
from atlas_jax.demo.factbook_text import Entity, Field


def _entity(*fields):
    return Entity("xy", "Xylia", tuple(Field(s, n, (("", t),)) for s, n, t in fields))


def test_short_neighbours_of_one_section_are_joined():
    passages = passages_of(
        _entity(
            ("Geography", "Area", "5 sq km"),
            ("Geography", "Climate", "mild"),
            ("Economy", "Industries", "none"),
        )
    )
    assert [p.row() for p in passages] == [
        {
            "id": "fb2026-xy-000",
            "title": "Xylia",
            "section": "Geography: Area, Climate",
            "text": "Area: 5 sq km. Climate: mild.",
        },
        {
            "id": "fb2026-xy-001",
            "title": "Xylia",
            "section": "Economy: Industries",
            "text": "Industries: none.",
        },
    ]
    assert passages[0].sources == (("Geography", "Area"), ("Geography", "Climate"))


def test_a_long_field_is_split_at_clauses_and_stands_alone():
    clauses = "; ".join(f"clause {n} has five words" for n in range(60))
    passages = passages_of(
        _entity(
            ("Government", "Suffrage", "universal"),
            ("Government", "Parties", clauses),
            ("Government", "Flag", "red"),
        )
    )
    texts = [p.text for p in passages]
    assert texts[0] == "Suffrage: universal." and texts[-1] == "Flag: red."
    assert all(t.startswith("Parties (continued): clause") for t in texts[2:-1])
    words = [len(t.split()) for t in texts[1:-1]]
    assert len(words) == 3 and max(words) <= MAX_WORDS + 2 and max(words) - min(words) < 12
    for number in range(60):
        assert sum(f"clause {number} has" in t for t in texts) == 1


def test_prose_is_split_at_sentences_not_at_abbreviations():
    sentence = "In 1 B.C. St. Peter and J. Smith saw " + "very " * 40 + "much."
    parts = split_long(" ".join([sentence] * 4), prose=True)
    assert parts == [f"{sentence} {sentence}"] * 2


def test_one_endless_clause_is_cut_all_the_same():
    parts = split_long("word " * 500)
    assert len(parts) >= 5 and all(len(p.split()) <= MAX_WORDS for p in parts)
    assert sum(len(p.split()) for p in parts) == 500


def test_brackets_keep_their_semicolons():
    text = "first (a; b; c) " + "x " * 70 + "; second " + "y " * 70
    assert [p.split()[0] for p in split_long(text)] == ["first", "second"]


def test_the_section_lists_every_field():
    fields = [("Communications", f"Field {n}", "1") for n in range(6)]
    (passage,) = passages_of(_entity(*fields))
    assert passage.section == "Communications: " + ", ".join(f"Field {n}" for n in range(6))
