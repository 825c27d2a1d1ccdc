"""Names of people as the World Factbook prints them: the family name in capitals."""

import re

from atlas_jax.demo.factbook_answers import Answers, unique, without_brackets

_TITLES = frozenset(
    "acting interim transition transitional caretaker overall current first president vice prime "
    "supreme leader chancellor premier taoiseach king queen emperor agong amir emir pope "
    "duke prince co-prince archbishop sir dame dr. general gen. lieutenant colonel col. captain "
    "capt. major marshal shaykh governor-general chairman chairperson chairwoman "
    "commission assembly minister foreign ambassador appointed designate highness majesty "
    "excellency regent head state government council chief counsellor affairs brig. lt. maj. sr. "
    "and the".split()
)
_ROMAN = re.compile(r"^[IVX]+$")
_CUT = re.compile(r"\s*(?:,|;|\bnote\b|\bsince\b|\brepresented\b| of (?:the )?(?=[A-Z][a-z]+$)).*$")


def _is_capital(word: str) -> bool:
    parts = ["".join(c for c in part if c.isalpha()) for part in word.split("-")]
    return any(len(part) > 1 and part.isupper() for part in parts)


def _without_titles(words: list[str]) -> list[str]:
    """Drop everything up to the last title that stands before the name's word in capitals.

    An abbreviation in capitals may stand before a title: `CNSP Prime Minister Ali ZEINE`.
    """
    title = [word.strip(",").lower() in _TITLES and not word.isupper() for word in words]
    last = -1
    for position, word in enumerate(words):
        if title[position]:
            last = position
        elif _is_capital(word) and not any(title[position + 1 : position + 3]):
            break
    rest = words[last + 1 :]
    if rest[:1] == ["of"]:  # President of the Government of Spain Pedro SANCHEZ
        rest = rest[3:] if rest[1:2] == ["the"] else rest[2:]
    return rest


def _lower(word: str) -> str:
    parts = re.split(r"([-'’])", word)
    return "".join(p.capitalize() if p.isupper() and len(p) > 1 else p for p in parts)


def person(text: str) -> Answers | None:
    """Return a person's full name and the family name: `Abdelmadjid TEBBOUNE` gives two answers.

    Titles before the name and remarks behind it are dropped. None where no word is in capitals
    (the post is vacant, or a body holds it).
    """
    name = without_brackets(re.split(r" \((?:since|acting|born|vacant)", text)[0])
    words = _CUT.sub("", " ".join(_without_titles(name.split()))).split()
    capital = [
        _is_capital(word) and not (position > 0 and _ROMAN.match(word))
        for position, word in enumerate(words)
    ]
    if not any(capital) or len(words) > 8:
        return None
    first = capital.index(True)
    last = first
    while last + 1 < len(words) and capital[last + 1]:
        last += 1
    plain = [_lower(word) if flag else word for word, flag in zip(words, capital, strict=True)]
    return unique([" ".join(plain), " ".join(plain[first : last + 1])])


def ambassador(text: str) -> Answers | None:
    """Return the name of an ambassador; other heads of mission give none."""
    return person(text) if text.startswith(("Ambassador", "Appointed Ambassador")) else None


def composer(text: str) -> Answers | None:
    """Return who wrote the music: the name behind the slash of `lyrics/music`."""
    if text.count("/") != 1:
        return None
    music = re.sub(r"^adapted by ", "", without_brackets(text.split("/")[1]))
    if re.search(r"unknown|traditional|\band\b|\bor\b|\[", music):
        return None
    return person(music)
