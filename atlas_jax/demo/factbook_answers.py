"""Find answers in the plain text of one field: each function maps a text to answers.

It returns the accepted answers, the canonical one first. If the text gives no clear answer it
returns None, and then there is no question about this fact.
"""

import re
from collections.abc import Callable

Answers = tuple[str, ...]
Parser = Callable[[str], Answers | None]

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"\b\d{{1,2}} (?:{MONTHS}) \d{{4}}\b")
_DAY = re.compile(rf"\b\d{{1,2}} (?:{MONTHS})\b")
_BRACKET = re.compile(r"\s*\([^()]*\)")
_NO_ANSWER = re.compile(r"^(?:NA|[Nn]one|no|unknown|unnamed)\b")
_NOT_A_GROUP = re.compile(
    r"^(?:and )?(?:other|none|no (?:religion|answer)|not |"
    r"un(?:specified|affiliated|known|declared)|refused|atheist|agnostic)",
    re.IGNORECASE,
)
_COUNTRY_ALIASES = {
    "USA": ("US", "United States"),
    "US": ("United States", "USA"),
    "UK": ("United Kingdom", "Britain"),
    "UAE": ("United Arab Emirates",),
    "NZ": ("New Zealand",),
    "S. Korea": ("South Korea",),
    "N. Korea": ("North Korea",),
    "DRC": ("Democratic Republic of the Congo",),
    "Soviet Union": ("USSR",),
}


def unique(answers: tuple[str, ...] | list[str]) -> Answers | None:
    """Return the answers that are not blank, each once and in order, or None if none is left."""
    kept = tuple(dict.fromkeys(a.strip(' ,;."“”') for a in answers))
    return tuple(a for a in kept if a) or None


def without_brackets(text: str) -> str:
    """Remove round brackets and what they hold, from the inside out."""
    previous = None
    while previous != text:
        previous, text = text, _BRACKET.sub("", text)
    return text.strip()


def split_outside_brackets(text: str, separators: str) -> list[str]:
    """Split at any of the separators' characters that stand outside brackets."""
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        inside_number = text[position + 1 : position + 2].isdigit()
        if character in separators and depth <= 0 and not inside_number:
            items.append(text[start:position].strip())
            start = position + 1
    return [item for item in (*items, text[start:].strip()) if item]


def bracketed_alias(text: str) -> tuple[str, ...]:
    """Split `name (other name)` into its names; only a bracket that ends the text counts."""
    name = without_brackets(text)
    behind = text[len(name) :].strip()
    if not name or not text.startswith(name) or not behind.startswith("("):
        return (text,)
    return (name, behind[1:].removesuffix(")"))


def alternatives(text: str) -> list[str]:
    """Split `absolute monarchy or sultanate` and `euros/francs` into their forms."""
    return [form for form in re.split(r" or |/", text) if form]


def capital(text: str) -> Answers | None:
    """Several capitals and other spellings in brackets are all accepted."""
    if re.match(r"no official|administered", text):
        return None
    names, others = [], []
    for clause in split_outside_brackets(text, ";"):
        if clause.startswith("note"):
            continue
        name, *bracket = bracketed_alias(clause)
        names.append(re.sub(r" in (?:Romanian|Russian)$", "", name))
        for spelling in re.split(r"[,/]", bracket[0] if bracket else ""):
            spelling = re.sub(r" in (?:Romanian|Russian)$", "", spelling.strip())
            if spelling and not re.search(r"\b(?:on|capital|city|seat|is|from)\b", spelling):
                others.append(spelling)
    return unique([*names, *others])


def highest_point(text: str) -> Answers | None:
    """The name before the elevation; unnamed points and mere directions give none."""
    match = re.match(r"(.*?)\s+[\d,.]+(?: m\b|$)", without_brackets(text))
    if not match or re.match(r"unnamed|\d", match[1]) or _NO_ANSWER.match(match[1]):
        return None
    return unique([match[1]])


def elevation(text: str) -> Answers | None:
    """`2,764 m` and the bare number."""
    match = re.search(r"(?:^|\s)(\d[\d,.]*)(?: m\b|$)", without_brackets(text))
    return (f"{match[1]} m", match[1]) if match else None


def internet_code(text: str) -> Answers | None:
    """The first country code, with and without its dot."""
    match = re.search(r"\.([a-z]{2})\b", text)
    return (f".{match[1]}", match[1]) if match else None


def day(text: str) -> Answers | None:
    """The first day of the year, `18 March`."""
    match = _DAY.search(without_brackets(text)) or _DAY.search(text)
    return (match[0],) if match else None


def anthem(text: str) -> Answers | None:
    """The quoted title and its translation in brackets; several quoted titles are all accepted."""
    titles = re.findall(r"[\"“]([^\"“”]+)[\"”]", text)
    if not titles:
        titles = re.findall(r"^[\"“]([^\"“”(]+)", text)
    translation = re.search(r"\(([^()]*)\)?\s*$", text)
    return unique([*titles, *([translation[1]] if translation and titles else [])])


def colors(text: str) -> Answers | None:
    """The list of colours as it stands, without remarks."""
    listed = without_brackets(split_outside_brackets(text, ";")[0])
    listed = re.sub(r"\s*(?:\bnote\b|[-–] ).*$", "", listed)
    return None if _NO_ANSWER.match(listed) or len(listed.split()) > 6 else unique([listed])


def official_languages(text: str) -> Answers | None:
    """Every language that is marked `(official)`, the first one first."""
    found = []
    for item in split_outside_brackets(text, ",;"):
        match = re.match(
            r"(?:and |the )?([A-Z][\w' -]*?)(?: [\d.]+%)? \((?:[^()]*\b)?official\b", item
        )
        if match and not re.search(r"\((?:[^()]*\b)?(?:not|un|semi|co)-?\s?official", item):
            language = re.sub(r" (?:only|dialects?|language)$", "", match[1])
            found.extend(alternatives(language))
    return unique(found)


def largest_group(text: str) -> Answers | None:
    """The group with the largest share.

    `other`, `none` and `unspecified` are no groups; where people of mixed descent are the most,
    there is no clear answer.
    """
    best, largest = "", 0.0
    for item in split_outside_brackets(text, ",;"):
        plain = re.sub(r"^and ", "", without_brackets(item))
        match = re.match(r"(.*?)\s*(?:[<>~]|less than)?\s*(\d[\d.]*)(?: ?- ?[\d.]+)?%", plain)
        if match and match[1] and not _NOT_A_GROUP.match(match[1]) and float(match[2]) > largest:
            best, largest = match[1], float(match[2])
    best = re.sub(r" (?:at least|about|approximately|over|more than)$", "", best)
    if not best or best.startswith("mixed") or len(best.split()) > 5 or ":" in best:
        return None
    return unique([best, *alternatives(best)])


def demonym(text: str) -> Answers | None:
    """The noun, its plural and other forms of it."""
    if _NO_ANSWER.match(text):
        return None
    forms = []
    for item in re.split(r",| or |/|;", text):
        match = re.match(r"\s*([^()]+?)\s*(?:\(([^()]*)\)|$)", item)
        if match:
            forms.append(match[1])
            forms.extend([match[1] + match[2]] if match[2] in ("s", "es") else [])
    return unique(forms)


def square_kilometres(text: str) -> Answers | None:
    """`180 sq km` and the bare number."""
    match = re.match(r"([\d,.]+(?: million)?) sq km", text)
    return (match[0], match[1]) if match else None


def coast(text: str) -> Answers | None:
    """`4,828 km` and the bare number; none for a landlocked country."""
    match = re.match(r"([\d,.]+) km", text)
    return (match[0], match[1]) if match and match[1] != "0" else None


def long_name(text: str) -> Answers | None:
    """The conventional long form."""
    name = re.sub(r"\s*\([^()]*\)$", "", split_outside_brackets(text, ";")[0])
    return None if _NO_ANSWER.match(name) else unique([name])


def legislature(text: str) -> Answers | None:
    """The name and its native form."""
    if _NO_ANSWER.match(text):
        return None
    name, *native = bracketed_alias(text)
    return unique([*re.split(r" - | or ", name), *native])


def aircraft_prefix(text: str) -> Answers | None:
    """The prefixes, each accepted."""
    prefixes = re.findall(r"\b[A-Z0-9][A-Z0-9-]{0,4}\b", without_brackets(text))
    return unique(prefixes)


def people(text: str) -> Answers | None:
    """A count of people."""
    match = re.match(r"(\d[\d,]*(?:\.\d+ million)?)", text)
    return (match[1].rstrip(","),) if match else None


def dollars(text: str) -> Answers | None:
    """The first amount in dollars."""
    match = re.search(r"\$\d[\d,]*", text)
    return (match[0],) if match else None


def years(text: str) -> Answers | None:
    """`38.1 years` and the bare number."""
    match = re.match(r"(\d[\d.]*) years", text)
    return (match[0], match[1]) if match else None


def trading_partner(text: str) -> Answers | None:
    """The first country of a list that is ordered by share; none where two share the lead."""
    shares = re.findall(r"(?:^|, )([^\d,;%]+?)\s+(\d[\d.]*)%", text)
    if not shares or (len(shares) > 1 and shares[0][1] == shares[1][1]):
        return None
    partner = shares[0][0]
    return unique([partner, *_COUNTRY_ALIASES.get(partner, ())])


def first_product(text: str) -> Answers | None:
    """The first product of a list."""
    product = without_brackets(split_outside_brackets(text, ",;")[0])
    product = product.removeprefix("small quantities of ")
    bad = _NO_ANSWER.match(product) or len(product.split()) > 4 or re.search(r"\d|:", product)
    return None if bad else unique([product])


def utc_offset(text: str) -> Answers | None:
    """`UTC+1`."""
    match = re.match(r"UTC ?[+-]?\d+(?::\d\d|\.\d+)?", text)
    return (match[0],) if match else None


def government_type(text: str) -> Answers | None:
    """The first clause up to a bracket or a qualification, and its core before `under`."""
    clause = re.split(r" \(|;| that\b| in free association", text)[0]
    if len(clause.split()) > 8 or re.search(r"territory|commonwealth| - |,", clause, re.IGNORECASE):
        return None
    core = [clause.split(" under ")[0]] if " under " in clause else []
    return unique([*alternatives(clause), *core])


def currency(text: str) -> Answers | None:
    """The currency's name in the plural of the edition and in the singular."""
    match = re.match(r"(.*?)\s*(?:\([^()]*\)\s*)?per US dollar\b(?!:)", text)
    if not match:
        return ("US dollar", "US dollars") if text.startswith("the US dollar") else None
    names = alternatives(match[1].strip())
    singular = [name[:-1] for name in names if name.endswith("s")]
    african = re.search(r"Communaut|Coop[eé]ration", match[1])
    return unique([*names, *singular, *(["CFA franc", "CFA francs"] if african else [])])


def currency_code(text: str) -> Answers | None:
    """The code in brackets."""
    match = re.match(r"[^()]*\(([A-Z]{3})\)\s*per US dollar", text)
    return (match[1],) if match else None


def independence_date(text: str) -> Answers | None:
    """The day on which the country left another, where the edition names both."""
    match = re.match(rf"({_DATE.pattern}) \(from ", text)
    return (match[1],) if match else None


def independence_from(text: str) -> Answers | None:
    """The state that the country left."""
    match = re.match(rf"{_DATE.pattern} \(from (?:the )?([^;,()]+)", text)
    if not match:
        return None
    state = match[1].strip()
    state = re.sub(r"^(UK|US) protectorate.*$|-administered .*$", r"\1", state)
    state = re.sub(r" (?:under|by|through|after)\b.*$", "", state)
    if len(state.split()) > 5 or re.search(
        r"\b(?:control|colonies|mandate|merger|trusteeship)\b", state
    ):
        return None
    both = re.split(r" and (?:the )?", state) if " and " in state else []
    return unique([state, *both, *_COUNTRY_ALIASES.get(state, ())])


def symbols(text: str) -> Answers | None:
    """The national symbols, each accepted; long descriptions are left out."""
    listed = [without_brackets(item) for item in split_outside_brackets(text, ",;")]
    short = [item for item in listed if len(item.split()) <= 6 and ":" not in item]
    return unique([item for item in short if not _NO_ANSWER.match(item)])


def longest_border(text: str) -> Answers | None:
    """The neighbour with the longest border."""
    lengths = []
    for item in split_outside_brackets(text, ",;"):
        match = re.match(r"(.*?)\s+([\d,.]+) km", without_brackets(item))
        if match and match[1] and "note" not in match[1]:
            lengths.append((float(match[2].rstrip(".").replace(",", "")), match[1]))
    if not lengths:
        return None
    longest = max(lengths, key=lambda pair: pair[0])[1]
    return unique([longest, *_COUNTRY_ALIASES.get(longest, ())])


def division_count(text: str) -> Answers | None:
    """`58 provinces` and the bare number."""
    match = re.match(r"(\d+) ([a-z][a-z -]*?)(?=\*| \(|;|,|:| and |$)", text)
    return (f"{match[1]} {match[2]}", match[1]) if match and len(match[2].split()) <= 4 else None


def since(text: str) -> Answers | None:
    """The day in the first `(since ...)`."""
    match = re.search(rf"\(since ({_DATE.pattern})", text)
    return (match[1],) if match else None


def former_names(text: str) -> Answers | None:
    """Every former name."""
    names = [without_brackets(item) for item in split_outside_brackets(text, ",;")]
    return unique(
        [n for n in names if not re.match(r"note|NA\b|none\b", n) and len(n.split()) <= 7]
    )


def largest_city(text: str) -> Answers | None:
    """The most populous of at least two cities."""
    cities = []
    for item in split_outside_brackets(text, ",;"):
        match = re.match(r"([\d,.]+)( million)? ([^\d(]+)", item)
        if match:
            number = float(match[1].replace(",", "")) * (1e6 if match[2] else 1)
            cities.append((number, match[3].strip()))
    if len(cities) < 2:
        return None
    name = max(cities, key=lambda pair: pair[0])[1]
    return unique([name.title().replace("'S", "'s") if name.isupper() else name])
