import pytest

from atlas_jax.core.errors import UserError
from atlas_jax.demo.factbook_text import clean, parse_entity, parse_fields


@pytest.mark.parametrize(
    ("fragment", "text"),
    [
        ("<p>One.</p> <p>Two.</p>", "One. Two."),
        ("Party A<br>Party B<br><br>Party C", "Party A; Party B; Party C"),
        ("<strong>note:</strong> in 2021&nbsp;dollars", "note: in 2021 dollars"),
        ("Jewish &lt;1%, R&eacute;union&rsquo;s", "Jewish <1%, Réunion’s"),
        ("less than 1%: Kurd<br>&lt;!--EndFragment --&gt;", "less than 1%: Kurd"),
        ('<em>ora </em>and <em>oubao</em> ("shell")', 'ora and oubao ("shell")'),
        ("<br>a@b.org<br><br>https://b.org/", "a@b.org; https://b.org/"),
        ("  <br> ", ""),
    ],
)
def test_clean_gives_plain_text(fragment, text):
    assert clean(fragment) == text


def test_a_label_that_the_text_repeats_is_printed_once():
    tree = {"Geography": {"Land use": {
        "agricultural land": {"text": "11.1%"},
        "agricultural land: arable land": {"text": "arable land: 9%"},
        "note": "<b>note:</b> of 2023",
    }}}  # fmt: skip
    (field,) = parse_fields(tree)
    assert field.body() == (
        "agricultural land: 11.1%; agricultural land: arable land: 9%; note: of 2023"
    )
    assert field.get("agricultural land: arable land") == "arable land: 9%"
    assert field.get("forest") is None


def test_a_field_that_is_printed_twice_is_kept_once_unless_it_differs():
    same = {"text": "dry"}
    tree = {
        "Geography": {"Climate": same, "Terrain": {"text": "flat"}},
        "Environment": {"Climate": same, "Terrain": {"text": "hilly"}},
    }
    kept = [(field.section, field.name) for field in parse_fields(tree)]
    assert kept == [("Geography", "Climate"), ("Geography", "Terrain"), ("Environment", "Terrain")]


def _named(**forms):
    return {
        "Government": {"Country name": {k.replace("_", " "): {"text": v} for k, v in forms.items()}}
    }


def test_titles_come_from_the_short_name_the_long_name_or_the_list():
    short = _named(conventional_short_form="Falkland Islands (Islas Malvinas)")
    none = _named(conventional_short_form="none", conventional_long_form="Republic of X")
    assert parse_entity("fk", short, {}).title == "Falkland Islands"
    assert parse_entity("xx", none, {}).title == "Republic of X"
    assert parse_entity("fk", short, {"fk": "Falklands"}).title == "Falklands"
    with pytest.raises(UserError, match="'zz'"):
        parse_entity("zz", {"Geography": {"Area": {"text": "1"}}}, {})
