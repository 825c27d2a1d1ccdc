"""Facts of a text: which labels, which values, and that they stand where they say."""

import pytest

from atlas_jax.tasks.facts import askable, find_facts


def pairs(text: str) -> list[tuple[str, str]]:
    return [(fact.label, fact.value(text)) for fact in find_facts(text)]


TEXTS = {
    "one field": ("Coastline: 14,500 km.", [("Coastline", "14,500 km")]),
    "no full stop at the end": ("Coastline: none", [("Coastline", "none")]),
    "subfields": (
        "Capital: name: Tirana; time difference: UTC+1. Climate: mild.",
        [("Capital name", "Tirana"), ("Capital time difference", "UTC+1"), ("Climate", "mild")],
    ),
    "nested subfields": (
        "People: age: median: total: 41.2 years; male: 39 years.",
        [("People age median total", "41.2 years"), ("People male", "39 years")],
    ),
    "a field after a semicolon": (
        "Exports: goods: wine; Imports: goods: oil.",
        [("Exports goods", "wine"), ("Imports goods", "oil")],
    ),
    "a remark in brackets": (
        "Area: total: 28,748 sq km (2023 est.); land: 27,398 sq km, (about).",
        [("Area total", "28,748 sq km"), ("Area land", "27,398 sq km")],
    ),
    "separators in brackets": (
        "Capital: Tirana (note: Tirane; also: Tirona. Old: no). Flag: red.",
        [("Capital", "Tirana"), ("Flag", "red")],
    ),
    "brackets in brackets": (
        "Party: ABC (Alba (since: 1990); old: XYZ); seats: 12.",
        [("Party", "ABC"), ("Party seats", "12")],
    ),
    "brackets in a label": (
        "GDP (in U.S. dollars): per head: 9 (2023).",
        [("GDP (in U.S. dollars) per head", "9")],
    ),
    "a bracket that is never closed": (
        "Area: 5 sq km (estimated. Capital: name: Tirana (Tirane).",
        [("Area", "5 sq km"), ("Capital name", "Tirana"), ("Capital name (", "Tirane")],
    ),
    "names in brackets": (
        "Money: kina (PGK); head: King AMO (since 9 May 2025, of age); seat: Ro (on Tao) (Ru).",
        [("Money", "kina"), ("Money (", "PGK"), ("Money head", "King AMO"),
         ("Money head since", "9 May 2025"), ("Money seat", "Ro")],
    ),
    "a bracket that was never opened": ("Ways: 1) vote; second: 2) buy.",
        [("Ways", "1) vote"), ("Ways second", "2) buy")]),
    "nothing before the bracket": ("Area: (unknown). Flag: red.", [("Flag", "red")]),
    "a list": ("Languages: Arabic, French, Tamazight.", [("Languages", "Arabic")]),
    "a list with shares": (
        "Religions: Sunni Muslim 56%, Catholic 10%.", [("Religions", "Sunni Muslim")]
    ),
    "a list with separators": (
        "Parts: 4 districts; Bel, Tut; note: of old; Tem. Land: borders: Bo 5 km; Ro 3.",
        [("Parts", "4 districts"), ("Parts note", "of old"), ("Land borders", "Bo 5 km")],
    ),
    "a plural in brackets": (
        "People: noun: Nauruan(s); adjective: Irish(wo)man(men) (old).",
        [("People noun", "Nauruan(s)"), ("People adjective", "Irish(wo)man(men)")],
    ),
    "an article in a remark": (
        "Free: 5 July 1962 (from the UK). Old: 1 May (the King).",
        [("Free", "5 July 1962"), ("Free from", "UK"), ("Old", "1 May")],
    ),
    "a negative share": ("Growth: fell by -3.1% a year.", [("Growth", "fell by")]),
    "a share as the value": (
        "Urban: 64.6% of all (2023); rate: 1.3%.",
        [("Urban", "64.6% of all"), ("Urban rate", "1.3%")],
    ),
    "a dash": ("Flag: red - the colour of blood.", [("Flag", "red")]),
    "a hyphen": ("Prefix: VP-A. Airports: 1.", [("Prefix", "VP-A"), ("Airports", "1")]),
    "prose after the value": ("Area: 5 sq km. It is small. Flag: red.",
        [("Area", "5 sq km"), ("Flag", "red")]),
    "initials": (
        "Head: President Wesley W. SIMINA (since 2023); deputy: J.M. SQUIRES.",
        [("Head", "President Wesley W. SIMINA"), ("Head since", "2023"),
         ("Head deputy", "J.M. SQUIRES")],
    ),
    "abbreviations": (
        "Ports: St. John's; peak: Mt. Fogo (2,829 m); ruler: Gen. Dr. MIN; era: 321 B.C. (old).",
        [("Ports", "St. John's"), ("Ports peak", "Mt. Fogo"), ("Ports ruler", "Gen. Dr. MIN"),
         ("Ports era", "321 B.C.")],
    ),
    "a capital that ends a field": (
        "Class: A. Imports: oil. Route: B.", [("Class", "A"), ("Imports", "oil"), ("Route", "B")]
    ),
    "no blank after the colon": ("Time: 12:30 local.", [("Time", "12:30 local")]),
    "other alphabets": ("État: nom: Élysée (Paris).", []),  # a field begins with A to Z
    "an empty part": ("Area: 5 sq km; ; land: 4; Flag: red.",
        [("Area", "5 sq km"), ("Area land", "4"), ("Flag", "red")]),
    "prose": ("It was founded in 1912. Many came: none stayed.", [("Many came", "none stayed")]),
    "no facts": ("The river Sann lies in the north of Arvo.", []),
    "a colon alone": (":", []),
    "nothing": ("", []),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_labels_and_values(case: str) -> None:
    text, expected = TEXTS[case]
    assert pairs(text) == expected


@pytest.mark.parametrize("case", TEXTS)
def test_facts_lie_apart_in_order_and_hold_no_separator(case: str) -> None:
    text = TEXTS[case][0]
    facts = find_facts(text)
    edges = [edge for fact in facts for edge in (fact.start, fact.end)]
    assert edges == sorted(set(edges))
    for fact in facts:
        value = fact.value(text)
        assert value and value == value.strip() and ";" not in value
        assert fact.label and ": " not in fact.label


def test_the_whole_of_a_value_has_its_list_and_its_remarks() -> None:
    text = "Colors: red, white (pale), green. Holiday: Day of Rest, 5 May (1921); note: none"
    found = {fact.label: fact.whole(text) for fact in find_facts(text)}
    assert found == {
        "Colors": "red, white (pale), green", "Holiday": "Day of Rest, 5 May (1921)",
        "Holiday note": "none",
    }  # fmt: skip
    words = " ".join(f"w{n}," for n in range(16))
    [long] = find_facts(f"List: {words} last.")
    assert long.stop == long.end == len("List: w0")


def test_labels_that_are_too_long_are_no_labels() -> None:
    eleven = " ".join(["So", *"many words that stand before a colon make no".split()])
    assert pairs(f"{eleven}: x: 1; y z: 2.") == [(f"{eleven} x", "1"), (f"{eleven} y z", "2")]
    assert pairs(f"{eleven}: x: 1; w y z: 2.") == [(f"{eleven} x", "1")]
    assert pairs(f"A{'b' * 71}: 1.") == []


def test_only_labels_of_their_own_with_short_values_are_asked_for() -> None:
    text = "Age: total: 4; total: 5; mean: 6. Note: a value of five words; male: 3."
    facts = find_facts(text)
    assert [fact.label for fact in facts] == [
        "Age total", "Age total", "Age mean", "Note", "Note male",
    ]  # fmt: skip
    assert [fact.label for fact in askable(facts, text, 4)] == ["Age mean", "Note male"]
    assert [fact.label for fact in askable(facts, text, 5)] == ["Age mean", "Note", "Note male"]
    assert askable((), text, 5) == ()
