"""The forty relations of the demo: the place of each answer, and the questions about it.

`facts_of` gives the facts of one country: a relation, its accepted answers, the canonical one
first, and the ids of the passages that hold it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atlas_jax.demo import factbook_answers as parse
from atlas_jax.demo.factbook_names import ambassador, composer, person
from atlas_jax.demo.factbook_passages import Passage
from atlas_jax.demo.factbook_text import Entity, Field

_ARTICLE = re.compile(
    r"^(?:The |Republic of|Democratic Republic of|Dominican Republic|Central African Republic|"
    r"Federated States|Gaza Strip|West Bank|Isle of Man|British|United|U\.S\.|European Union|"
    r"Philippines|Maldives|Netherlands|Comoros|Seychelles)| (?:Islands|Territory)$"
)


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
      name: its name in the data files.
      group: how fast it changes: static, slow or temporal.
      path: section, field and subfield that hold it; the subfield may be a pattern, of which the
        last match in the edition's alphabetical order (the latest year) counts.
      parse: from the field's text to the accepted answers.
      wordings: ways to ask, `{}` standing for the country.
      sovereign: whether dependent territories are left out, whose offices are ambiguous.
    """

    name: str
    group: str
    path: tuple[str, str, str]
    parse: parse.Parser
    wordings: tuple[str, ...]
    sovereign: bool = False


@dataclass(frozen=True)
class Fact:
    """One country's answer to one relation; `gold` are ids of the passages that hold it."""

    entity: Entity
    relation: Relation
    answers: tuple[str, ...]
    gold: tuple[str, ...]


_GEOGRAPHY, _PEOPLE, _GOVERNMENT, _ECONOMY = (
    "Geography",
    "People and Society",
    "Government",
    "Economy",
)
_EXECUTIVE = "Executive branch"

RELATIONS: tuple[Relation, ...] = (
    Relation("capital", "static", (_GOVERNMENT, "Capital", "name"), parse.capital,
             ("What is the capital of {}?", "Which city is the capital of {}?",
              "what city is the capital of {}", "Name the capital city of {}.")),
    Relation("highest_point", "static", (_GEOGRAPHY, "Elevation", "highest point"),
             parse.highest_point,
             ("What is the highest point in {}?", "What is the highest mountain or point of {}?",
              "which peak is the highest point of {}", "Name the highest point in {}.")),
    Relation("highest_point_m", "static", (_GEOGRAPHY, "Elevation", "highest point"),
             parse.elevation,
             ("How high is the highest point of {}, in metres?",
              "What is the elevation in metres of the highest point in {}?",
              "how many meters high is the highest point of {}")),
    Relation("area", "static", (_GEOGRAPHY, "Area", "total"), parse.square_kilometres,
             ("What is the total area of {}?", "How large is {} in square kilometres?",
              "how many square kilometers is {}", "What is the area of {}?")),
    Relation("coastline", "static", (_GEOGRAPHY, "Coastline", ""), parse.coast,
             ("How long is the coastline of {}?",
              "What is the length of {}'s coast in kilometres?",
              "how many kilometers of coastline does {} have")),
    Relation("longest_border", "static", (_GEOGRAPHY, "Land boundaries", "border countries"),
             parse.longest_border,
             ("With which country does {} share its longest land border?",
              "Which neighbour has the longest border with {}?",
              "what country has the longest border with {}")),
    Relation("population", "temporal", (_PEOPLE, "Population", "(?:total)?"), parse.people,
             ("What is the population of {}?", "How many people live in {}?",
              "how many inhabitants does {} have")),
    Relation("median_age", "temporal", (_PEOPLE, "Median age", "total"), parse.years,
             ("What is the median age in {}?", "How old is the median inhabitant of {}?",
              "median age of people in {}")),
    Relation("life_expectancy", "temporal",
             (_PEOPLE, "Life expectancy at birth", "total population"), parse.years,
             ("What is the life expectancy at birth in {}?",
              "How long do people in {} live on average?", "life expectancy of {}")),
    Relation("demonym", "static", (_PEOPLE, "Nationality", "noun"), parse.demonym,
             ("What is a person from {} called?", "What do you call the people of {}?",
              "what is the demonym for people of {}")),
    Relation("official_language", "static", (_PEOPLE, "Languages", "(?:Languages)?"),
             parse.official_languages,
             ("What is the official language of {}?", "Which language is official in {}?",
              "what is an official language of {}")),
    Relation("largest_religion", "slow", (_PEOPLE, "Religions", ""), parse.largest_group,
             ("What is the largest religion in {}?",
              "Which religion has the most followers in {}?",
              "what religion do most people in {} follow")),
    Relation("largest_ethnic_group", "slow", (_PEOPLE, "Ethnic groups", ""), parse.largest_group,
             ("What is the largest ethnic group in {}?",
              "Which ethnic group makes up most of the population of {}?",
              "biggest ethnic group of {}")),
    Relation("largest_city", "slow", (_PEOPLE, "Major urban areas - population", ""),
             parse.largest_city,
             ("What is the largest city in {}?", "Which urban area of {} has the most people?",
              "what is the most populous city of {}")),
    Relation("long_name", "static", (_GOVERNMENT, "Country name", "conventional long form"),
             parse.long_name,
             ("What is the official long name of {}?", "What is {} called in full?",
              "full formal name of {}")),
    Relation("former_name", "static", (_GOVERNMENT, "Country name", "former"), parse.former_names,
             ("What was {} formerly called?", "What is a former name of {}?",
              "what was the old name of {}")),
    Relation("government_type", "slow", (_GOVERNMENT, "Government type", ""),
             parse.government_type,
             ("What type of government does {} have?", "What is the form of government of {}?",
              "how is {} governed")),
    Relation("utc_offset", "static", (_GOVERNMENT, "Capital", "time difference"),
             parse.utc_offset,
             ("What is the time zone of the capital of {}?",
              "How far from UTC is the time in the capital of {}?", "UTC offset of {}")),
    Relation("admin_divisions", "static", (_GOVERNMENT, "Administrative divisions", ""),
             parse.division_count,
             ("How many administrative divisions does {} have?",
              "Into how many regions, provinces or districts is {} divided?",
              "number of first-order administrative divisions of {}")),
    Relation("independence_date", "static", (_GOVERNMENT, "Independence", ""),
             parse.independence_date,
             ("When did {} become independent?", "On what date did {} gain independence?",
              "what is the date of independence of {}")),
    Relation("independence_from", "static", (_GOVERNMENT, "Independence", ""),
             parse.independence_from,
             ("From which country did {} gain independence?",
              "Which country ruled {} before independence?",
              "which power did {} become independent from")),
    Relation("national_holiday_date", "static", (_GOVERNMENT, "National holiday", ""), parse.day,
             ("On what date is the national holiday of {}?",
              "When does {} celebrate its national holiday?",
              "what day of the year is {}'s national holiday")),
    Relation("national_symbol", "static", (_GOVERNMENT, "National symbol(s)", ""), parse.symbols,
             ("What is the national symbol of {}?", "Which symbol stands for {}?",
              "what is a national symbol of {}")),
    Relation("national_colors", "static", (_GOVERNMENT, "National color(s)", ""), parse.colors,
             ("What are the national colors of {}?",
              "Which colours are the national colours of {}?", "national colors of {}")),
    Relation("anthem", "static", (_GOVERNMENT, "National anthem(s)", "title"), parse.anthem,
             ("What is the title of the national anthem of {}?",
              "What is {}'s national anthem called?", "name of the national anthem of {}")),
    Relation("anthem_author", "static", (_GOVERNMENT, "National anthem(s)", "lyrics/music"),
             composer,
             ("Who wrote the music of the national anthem of {}?",
              "Who composed the national anthem of {}?", "composer of {}'s national anthem")),
    Relation("legislature", "static", (_GOVERNMENT, "Legislative branch", "legislature name"),
             parse.legislature,
             ("What is the legislature of {} called?",
              "What is the name of the parliament of {}?", "name of {}'s legislature")),
    Relation("chief_of_state", "temporal", (_GOVERNMENT, _EXECUTIVE, "chief of state"), person,
             ("Who is the chief of state of {}?", "Who is the head of state of {}?",
              "who is {}'s current head of state", "Name the chief of state of {}."), True),
    Relation("chief_of_state_since", "temporal", (_GOVERNMENT, _EXECUTIVE, "chief of state"),
             parse.since,
             ("Since when has the current chief of state of {} been in office?",
              "When did the current head of state of {} take office?",
              "On what date did {}'s present chief of state come to office?"), True),
    Relation("head_of_government", "temporal", (_GOVERNMENT, _EXECUTIVE, "head of government"),
             person,
             ("Who is the head of government of {}?", "Who heads the government of {}?",
              "who leads the government of {}", "Which person is head of government in {}?"),
             True),
    Relation("ambassador_to_us", "temporal",
             (_GOVERNMENT, "Diplomatic representation in the US", "chief of mission"), ambassador,
             ("Who is the ambassador of {} to the United States?",
              "Who heads the mission of {} in Washington?", "name of {}'s ambassador in the US")),
    Relation("gdp_per_capita", "temporal",
             (_ECONOMY, "Real GDP per capita", r"(?:Real GDP per capita \d{4})?"), parse.dollars,
             ("What is the GDP per capita of {}?", "How high is real GDP per person in {}?",
              "gdp per head in {}")),
    Relation("export_partner", "temporal", (_ECONOMY, "Exports - partners", ""),
             parse.trading_partner,
             ("What is the largest export partner of {}?",
              "Which country buys the most exports from {}?",
              "where do most of {}'s exports go")),
    Relation("import_partner", "temporal", (_ECONOMY, "Imports - partners", ""),
             parse.trading_partner,
             ("From which country does {} import the most?",
              "What is the largest import partner of {}?",
              "where do most of {}'s imports come from")),
    Relation("export_commodity", "slow", (_ECONOMY, "Exports - commodities", ""),
             parse.first_product,
             ("What is the main export of {}?", "Which commodity leads the exports of {}?",
              "what does {} export most")),
    Relation("top_crop", "slow", (_ECONOMY, "Agricultural products", ""), parse.first_product,
             ("What is the top agricultural product of {}?",
              "Which farm product ranks first in {}?", "main agricultural product of {}")),
    Relation("currency", "slow", (_ECONOMY, "Exchange rates", "(?:Currency)?"), parse.currency,
             ("What currency is used in {}?", "What is the currency of {}?",
              "which money do people use in {}", "What is the name of the currency of {}?")),
    Relation("currency_code", "slow", (_ECONOMY, "Exchange rates", "Currency"),
             parse.currency_code,
             ("What is the three-letter code of the currency of {}?",
              "Which currency code does {} use?", "what is the ISO currency code of {}")),
    Relation("internet_code", "static", ("Communications", "Internet country code", ""),
             parse.internet_code,
             ("What is the Internet country code of {}?",
              "Which top-level domain belongs to {}?",
              "what is the internet domain code for {}")),
    Relation("aircraft_prefix", "static",
             ("Transportation", "Civil aircraft registration country code prefix", ""),
             parse.aircraft_prefix,
             ("What is the civil aircraft registration prefix of {}?",
              "Which prefix do aircraft registered in {} carry?",
              "aircraft registration code of {}")),
)  # fmt: skip


def subject(title: str) -> str:
    """Return a country's name as it stands inside a sentence: `the Bahamas`, `Chad`."""
    if not _ARTICLE.search(title):
        return title
    return "the " + title.removeprefix("The ")


def _value(field: Field, subfield: str) -> str | None:
    matching = sorted((label, text) for label, text in field.parts if re.fullmatch(subfield, label))
    return matching[-1][1] if matching else None


def _holds(text: str, answer: str) -> bool:
    pattern = rf"(?<![\w.])(?<!\d,){re.escape(answer.casefold())}(?!\w|[.,]\d)"
    return re.search(pattern, text.casefold()) is not None


def gold_passages(
    answers: Sequence[str], source: tuple[str, str], passages: Sequence[Passage]
) -> tuple[str, ...]:
    """Return the ids of the passages that render `source` and hold an answer word for word."""
    rendering = [passage for passage in passages if source in passage.sources]
    for answer in answers:
        ids = tuple(p.id for p in rendering if _holds(p.text, answer))
        if ids:
            return ids
    return ()


def facts_of(
    entity: Entity, passages: Sequence[Passage], relations: Sequence[Relation] = RELATIONS
) -> Iterator[Fact]:
    """Yield a country's facts in the relations' order.

    A fact is left out where the field is missing, its answer is unclear or no passage holds it.
    """
    dependent = entity.field(_GOVERNMENT, "Dependency status") is not None
    for relation in relations:
        section, name, subfield = relation.path
        field = entity.field(section, name)
        value = _value(field, subfield) if field else None
        if value is None or (relation.sovereign and dependent):
            continue
        answers = relation.parse(value)
        if not answers:
            continue
        gold = gold_passages(answers, (section, name), passages)
        if gold:
            yield Fact(entity, relation, answers, gold)
