"""The Factbook in ways that nothing was trained on: other words, and another cut into passages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from atlas_jax.core.jsonl import JsonObject
from atlas_jax.demo.factbook_relations import subject
from atlas_jax.tasks.metrics import answer_in_passage

CUT_WORDS = 60
# Of each relation, a wording that no question file has.

WORDINGS = {
    "capital": "From which town is {} governed?",
    "highest_point": "Where in {} would a climber stand above everything else?",
    "highest_point_m": "At what altitude does the top of {} lie?",
    "area": "How much surface does {} cover?",
    "coastline": "How many kilometres of sea shore belong to {}?",
    "longest_border": "Next to whom does {} have its longest frontier?",
    "population": "To how many souls is {} home?",
    "median_age": "Half of the people in {} are younger than what age?",
    "life_expectancy": "What age can a baby born in {} hope to reach?",
    "demonym": "How does one refer to citizens of {}?",
    "official_language": "In which tongue are the laws of {} written?",
    "largest_religion": "To which faith do most believers in {} belong?",
    "largest_ethnic_group": "Members of which people are most numerous in {}?",
    "largest_city": "In which town of {} do most people live?",
    "long_name": "Under what complete title is {} known to diplomats?",
    "former_name": "By what name did {} go in earlier times?",
    "government_type": "What political system is {} under?",
    "utc_offset": "By how many hours does the clock in {}'s seat of government differ from UTC?",
    "admin_divisions": "Into how many parts is {} split for its administration?",
    "independence_date": "Since what day has {} been sovereign?",
    "independence_from": "Whose rule did {} shake off?",
    "national_holiday_date": "Which day do people in {} keep as their national feast?",
    "national_symbol": "Which emblem represents {}?",
    "national_colors": "In what colours does {} present itself?",
    "anthem": "Which song is played for {} at the Olympic Games?",
    "anthem_author": "To whom do we owe the tune of {}'s anthem?",
    "legislature": "What do they call the house of lawmakers in {}?",
    "chief_of_state": "Who stands at the very top of the state of {}?",
    "chief_of_state_since": "From what day on has {} had its present head of state?",
    "head_of_government": "Who runs the cabinet of {}?",
    "ambassador_to_us": "Who represents {} at the White House?",
    "gdp_per_capita": "What does each inhabitant of {} produce in a year, in dollars?",
    "export_partner": "To whom does {} sell the most?",
    "import_partner": "From whom does {} buy the most?",
    "export_commodity": "Which good brings {} the most money from abroad?",
    "top_crop": "What do the farmers of {} harvest the most of?",
    "currency": "With what does one pay in the shops of {}?",
    "currency_code": "How do banks abbreviate the money of {}?",
    "internet_code": "How do web addresses from {} end?",
    "aircraft_prefix": "With what letters do the marks of planes from {} begin?",
}


def reworded(question: Mapping[str, Any]) -> JsonObject:
    """A question `{title, relation, ...}` of the Factbook in the other wording."""
    text = WORDINGS[question["relation"]].replace("{}", subject(question["title"]))
    return {**question, "question": text[0].upper() + text[1:]}


def cut_again(passages: Iterable[JsonObject], words: int = CUT_WORDS) -> list[JsonObject]:
    """The texts of each title, joined and cut anew, each piece with about this many words."""
    texts: dict[str, list[str]] = {}
    for passage in passages:
        texts.setdefault(passage["title"], []).extend(passage["text"].split())
    return [
        {"id": f"{title}-{start}", "title": title, "section": "",
         "text": " ".join(text[start : start + words])}
        for title, text in texts.items()
        for start in range(0, len(text), words)
    ]  # fmt: skip


def found_again(
    questions: Iterable[JsonObject], passages: Sequence[JsonObject]
) -> list[JsonObject]:
    """Questions with the passages of their title that hold an answer as gold; others are left."""
    by_title: dict[str, list[JsonObject]] = {}
    for passage in passages:
        by_title.setdefault(passage["title"], []).append(passage)
    told = (
        {**q, "gold": [p["id"] for p in by_title[q["title"]]
                       if answer_in_passage(p["text"], q["answers"])]}
        for q in questions
    )  # fmt: skip
    return [question for question in told if question["gold"]]
