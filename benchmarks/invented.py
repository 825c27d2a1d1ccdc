"""Invented corpora in plain English: 300 passages about things that nobody has read of.

Each passage is of one of eight domains. Its facts stand in sentences that vary, between sentences
that say nothing. Training and test questions ask about different things, and partly in different
words.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

Draw = Callable[[random.Random], str]
Row = dict[str, Any]
# What is asked for: how its value is drawn, sentences that tell it, questions that ask for it. The
# last question is asked in tests alone.
Fact = tuple[Draw, tuple[str, ...], tuple[str, ...]]

_FIRST = "Ada Boris Clara Dmitri Elif Farid Greta Hugo Ines Jonas Kaya Lena Nadia Oskar".split()
_LAST = "Abel Brandt Castell Dorr Eklund Ferro Gruber Halvor Ibsen Jarvis Kestrel Lindqvist".split()
_PLACES = "Alverton Brenmoor Castleby Dunmere Eastholm Farrow Grenvik Holloway Kelford".split()
_STARTS = "Al Bel Cor Dan Em Fer Gal Hal Is Jor Kel Lor Mar Nor Or Pel Quin Ros Sel Tor".split()
_ENDS = "anda aris edor enna ilo imar ona oris ulan ura etto evin amor iska osta umir".split()
_FILLERS = (
    "Visitors often say that it is smaller than they had imagined.",
    "Little was written about it before the last century.",
    "Opinions on its importance differ.",
    "Several photographs of it have been published.",
    "A short film about it was shown at a school some time ago.",
    "There has been talk of a new book on the subject.",
    "Nobody seems to know why it is so often confused with others of its kind.",
    "Most of what is known comes from letters and from the memory of neighbours.",
    "In wet years things were harder, and records were not always kept with care.",
    "A society of friends meets every spring to discuss it.",
)


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def _of(*values: str) -> Draw:
    return lambda rng: rng.choice(values)


def _number(low: int, high: int, unit: str = "") -> Draw:
    return lambda rng: f"{rng.randint(low, high):,}{' ' if unit else ''}{unit}"


def _year(rng: random.Random) -> str:
    return str(rng.randint(1620, 2019))


def _place(rng: random.Random) -> str:
    return rng.choice(_PLACES)


_DOMAINS: dict[str, tuple[Fact, ...]] = {
    "{} Museum": (
        (_year, ("The {name} opened its doors in {}.", "It was in {} that the {name} was opened."),
         ("When did the {name} open?", "In what year was the {name} opened?",
          "Since which year can people visit the {name}?")),
        (_person, ("The building was designed by {}.", "{} drew the plans of the building."),
         ("Who designed the {name}?", "Who was the architect of the {name}?",
          "By whom were the plans of the {name} drawn?")),
        (_of("old clocks", "glass", "ship models", "butterflies", "maps", "musical instruments"),
         ("It is best known for its collection of {}.", "Its rooms are filled with {}."),
         ("What does the {name} collect?", "What is the {name} known for?",
          "What can one see in the {name}?")),
    ),
    "{}ine": (
        (_of("headaches", "fever", "coughs", "back pain", "sleeplessness", "hay fever"),
         ("Doctors prescribe {name} against {}.", "{name} is taken for {}."),
         ("What is {name} used against?", "What does {name} treat?",
          "Which complaint does one take {name} for?")),
        (_number(5, 900, "mg"), ("Adults take {} a day.", "The usual daily dose is {}."),
         ("What is the daily dose of {name}?", "How much {name} does an adult take a day?",
          "What amount of {name} is usual per day?")),
        (_person, ("It was first made by the chemist {}.", "{} discovered {name} by chance."),
         ("Who discovered {name}?", "Which chemist first made {name}?",
          "Who is {name} owed to?")),
    ),
    "River {}": (
        (_number(20, 900, "km"), ("The {name} is {} long.", "Over {} the {name} winds to the sea."),
         ("How long is the {name}?", "What is the length of the {name}?",
          "How many kilometres does the {name} run?")),
        (_place, ("It rises near {}.", "Its source lies in the hills above {}."),
         ("Where does the {name} rise?", "Where is the source of the {name}?",
          "Near which place does the {name} begin?")),
        (_of("salmon", "trout", "eels", "pike", "carp"),
         ("Anglers come for its {}.", "The water is rich in {}."),
         ("What fish is the {name} known for?", "Which fish live in the {name}?",
          "What do anglers catch in the {name}?")),
    ),
    "{} Works": (
        (_person, ("{} founded the {name} in a rented shed.", "The company goes back to {}."),
         ("Who founded the {name}?", "Who was the founder of the {name}?",
          "Who started the {name}?")),
        (_of("bicycles", "umbrellas", "lamps", "pianos", "tractors", "paper", "locks"),
         ("The {name} makes {}.", "Today it sells {} in many countries."),
         ("What does the {name} make?", "What are the products of the {name}?",
          "Which goods come from the {name}?")),
        (_number(12, 9000), ("It employs {} people.", "{} men and women work there."),
         ("How many people work for the {name}?", "How many employees does the {name} have?",
          "What is the size of the staff of the {name}?")),
    ),
    "The House of {}": (
        (_person, ("{name} is a novel by {}.", "The book was written by {} in one winter."),
         ("Who wrote {name}?", "Who is the author of {name}?",
          "Whose novel is {name}?")),
        (_year, ("It was published in {}.", "The first edition appeared in {}."),
         ("When was {name} published?", "In what year did {name} appear?",
          "What is the year of the first edition of {name}?")),
        (_place, ("The story is set in {}.", "All of it happens in {}."),
         ("Where is {name} set?", "In which town does {name} take place?",
          "What is the scene of {name}?")),
    ),
    "{} warbler": (
        (_of("insects", "seeds", "berries", "snails", "spiders"),
         ("The {name} feeds on {}.", "Its food consists of {}."),
         ("What does the {name} eat?", "What does the {name} feed on?",
          "What is the food of the {name}?")),
        (_number(2, 9), ("The female lays {} eggs.", "There are {} eggs in a nest."),
         ("How many eggs does the {name} lay?", "How many eggs are in a nest of the {name}?",
          "What is the number of eggs of the {name}?")),
        (_of("a yellow throat", "a grey crown", "a red spot", "white wing bars"),
         ("It can be told by {}.", "One knows it by {}."),
         ("How can the {name} be told?", "What is the mark of the {name}?",
          "By what does one recognise the {name}?")),
    ),
    "{} Bridge": (
        (_number(40, 2400, "metres"), ("The {name} is {} long.", "It crosses the water in {}."),
         ("How long is the {name}?", "What is the length of the {name}?",
          "What distance does the {name} span?")),
        (_year, ("It was finished in {}.", "Traffic has crossed it since {}."),
         ("When was the {name} finished?", "In which year was the {name} completed?",
          "Since when has there been traffic on the {name}?")),
        (_of("steel", "stone", "brick", "timber", "concrete"),
         ("It is built of {}.", "The arches are of {}."),
         ("What is the {name} built of?", "What material is the {name} made of?",
          "Of what do the arches of the {name} consist?")),
    ),
    "{} Festival": (
        (_place, ("The {name} takes place in {}.", "Each year {} is host to the {name}."),
         ("Where does the {name} take place?", "Which town hosts the {name}?",
          "In what place do people meet for the {name}?")),
        (_of("May", "June", "August", "October", "December"),
         ("It is held in {}.", "In {} the streets are full."),
         ("When is the {name} held?", "In which month is the {name}?",
          "What time of the year is the {name}?")),
        (_of("jazz", "poetry", "cheese", "kites", "puppets", "choirs"),
         ("It is devoted to {}.", "Its subject is {}."),
         ("What is the {name} devoted to?", "What is the {name} about?",
          "What do people come to the {name} for?")),
    ),
}  # fmt: skip


def invent(
    seed: int, passages: int = 300, learnt: int = 64, asked: int = 150
) -> dict[str, list[Row]]:
    """One corpus: `passages`, and the questions `train` and `test`.

    A corpus of another seed has other names and values. In `test`, a third of the questions are
    `unseen`: their wording is in no training question.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    questions: list[list[Row]] = []
    for number, (title, facts) in enumerate(_names(rng, passages)):
        told: list[str] = []
        asks: list[Row] = []
        for draw, sentences, wordings in facts:
            value = draw(rng)
            told.append(_filled(rng.choice(sentences), title, value))
            for place, wording in enumerate(wordings):
                asks.append({
                    "question": _filled(wording, title, value), "answers": [value],
                    "gold": [str(number)], "unseen": place == len(wordings) - 1,
                })  # fmt: skip
        rng.shuffle(told)
        rows.append({"id": str(number), "title": title, "text": _mixed(told, rng)})
        questions.append(asks)
    order = rng.sample(range(len(rows)), len(rows))
    train = [rng.choice([q for q in questions[i] if not q["unseen"]]) for i in order[:learnt]]
    rest = [q for i in order[learnt:] for q in questions[i]]
    return {"passages": rows, "train": train, "test": rng.sample(rest, asked)}


def _filled(text: str, name: str, value: str) -> str:
    text = text.replace("{}", value).replace("{name}", name)
    return text[0].upper() + text[1:]


def _names(rng: random.Random, count: int) -> list[tuple[str, Sequence[Fact]]]:
    words = [a + b for a in _STARTS for b in _ENDS]
    names = rng.sample(words, count)
    kinds = list(_DOMAINS.items())
    return [(kinds[n % len(kinds)][0].format(name), kinds[n % len(kinds)][1])
            for n, name in enumerate(names)]  # fmt: skip


def _mixed(told: Sequence[str], rng: random.Random) -> str:
    """The sentences that tell, between others; 20 to about 200 words."""
    sentences = list(told)
    for filler in rng.sample(_FILLERS, rng.randint(0, len(_FILLERS))):
        sentences.insert(rng.randint(1, len(sentences)), filler)
    return " ".join(sentences)
