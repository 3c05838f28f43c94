"""Invented facts, the sentences that state them and the questions that ask for them.

Everything follows from the random generator that is passed in: the same seed gives the same facts. Names are put
together from syllables, so that a value cannot be known, only copied.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NOT_FOUND = "Not in the context."

_ONSETS = "b br d dr f fl g gr h j k kl kr l m n p pr r s sk sl st sv t tr th v w z vr gl pl dw".split()
_VOWELS = "a e i o u ae ei ia o u a e y".split()
_CODAS = ["", "", "", "l", "n", "r", "s", "k", "m", "rn", "st", "nd", "ld", "rk", "th", "x"]
_KINDS = ["Station", "Workshop", "Archive", "Garden", "Office", "Laboratory", "Mill", "Harbour", "Library", "Depot"]
_COLOURS = "amber azure black copper crimson green grey indigo ivory ochre orange purple red silver teal white".split()
_VEHICLES = "barge bicycle cart ferry lorry minibus sledge tractor tram van wagon balloon".split()


def word(rng: random.Random, syllables: int | None = None) -> str:
    """A capitalised invented word."""
    count = syllables or rng.choice((2, 2, 2, 3))
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)]
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def person(rng: random.Random) -> str:
    """First name and surname."""
    return f"{word(rng, 2)} {word(rng)}"


def entity(rng: random.Random) -> str:
    """The name of a place, team or project."""
    return f"{word(rng)} {rng.choice(_KINDS)}" if rng.random() < 0.4 else word(rng)


@dataclass(frozen=True)
class Relation:
    """Something that can be said of an entity.

    Attributes:
        statements: sentences with ``{e}`` and ``{v}``.
        questions: questions with ``{e}``.
        value: draws a value.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    value: Callable[[random.Random], str]


def _amount(rng: random.Random) -> str:
    return f"{rng.randrange(12, 980)},{rng.choice(('000', '500', '250', '750'))} crowns"


def _hours(rng: random.Random) -> str:
    return f"{rng.randrange(6, 11)}:{rng.choice(('00', '15', '30', '45'))} to {rng.randrange(14, 21)}:{rng.choice(('00', '30'))}"


def _room(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRSTUVW')}-{rng.randrange(101, 999)}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXZ") for _ in range(2))
    return f"{letters}{rng.randrange(1000, 9999)}"


RELATIONS = (
    Relation(
        "leader",
        ("{e} is led by {v}.", "{v} leads {e}.", "The head of {e} is {v}.", "{v} has been in charge of {e} for years."),
        ("Who leads {e}?", "Who is the head of {e}?", "Who is in charge of {e}?"),
        person,
    ),
    Relation(
        "deputy",
        ("{v} is the deputy at {e}.", "The deputy head of {e} is {v}.", "At {e}, {v} serves as deputy."),
        ("Who is the deputy at {e}?", "Who is the deputy head of {e}?"),
        person,
    ),
    Relation(
        "founded",
        ("{e} was founded in {v}.", "{e} has existed since {v}.", "The founding year of {e} is {v}."),
        ("When was {e} founded?", "In which year was {e} founded?", "Since when has {e} existed?"),
        lambda rng: str(rng.randrange(1780, 2024)),
    ),
    Relation(
        "location",
        ("{e} is located in {v}.", "{e} lies in {v}.", "You will find {e} in {v}."),
        ("Where is {e} located?", "Where is {e}?", "In which town is {e}?"),
        word,
    ),
    Relation(
        "staff",
        ("{e} employs {v}.", "{v} work at {e}.", "The staff of {e} counts {v}."),
        ("How many people work at {e}?", "How many people does {e} employ?"),
        lambda rng: f"{rng.randrange(3, 480)} people",
    ),
    Relation(
        "budget",
        ("The yearly budget of {e} is {v}.", "{e} has a budget of {v}.", "{e} spends {v} a year."),
        ("What is the budget of {e}?", "How much does {e} spend a year?"),
        _amount,
    ),
    Relation(
        "extension",
        ("The phone extension of {e} is {v}.", "{e} can be reached at extension {v}.", "Dial {v} to reach {e}."),
        ("What is the phone extension of {e}?", "Which extension reaches {e}?"),
        lambda rng: str(rng.randrange(1000, 9999)),
    ),
    Relation(
        "room",
        ("{e} meets in room {v}.", "The meeting room of {e} is {v}.", "Room {v} belongs to {e}."),
        ("Which room belongs to {e}?", "In which room does {e} meet?"),
        _room,
    ),
    Relation(
        "codename",
        ("The code name of {e} is {v}.", "Internally, {e} is called {v}.", "{e} goes by the code name {v}."),
        ("What is the code name of {e}?", "What is {e} called internally?"),
        lambda rng: word(rng).upper(),
    ),
    Relation(
        "supplier",
        ("{e} buys its material from {v}.", "The supplier of {e} is {v}.", "{v} supplies {e}."),
        ("Who supplies {e}?", "Who is the supplier of {e}?"),
        lambda rng: f"{word(rng)} {rng.choice(('Ltd', 'Brothers', 'Works', 'Trading'))}",
    ),
    Relation(
        "hours",
        ("{e} is open from {v}.", "The opening hours of {e} are {v}.", "Visitors are welcome at {e} from {v}."),
        ("What are the opening hours of {e}?", "When is {e} open?"),
        _hours,
    ),
    Relation(
        "product",
        ("{e} makes the {v}.", "The {v} is made by {e}.", "The best known product of {e} is the {v}."),
        ("What does {e} make?", "What is the best known product of {e}?"),
        lambda rng: f"{word(rng)} {rng.choice(('lamp', 'valve', 'clock', 'engine', 'loom', 'pump', 'lens', 'kettle'))}",
    ),
    Relation(
        "colour",
        ("The colour of {e} is {v}.", "The doors of {e} are painted {v}.", "{e} uses {v} as its colour."),
        ("What is the colour of {e}?", "Which colour does {e} use?"),
        lambda rng: f"{rng.choice(('dark', 'light', 'pale', 'bright'))} {rng.choice(_COLOURS)}",
    ),
    Relation(
        "vehicle",
        ("{e} owns a {v}.", "Goods reach {e} by {v}.", "The vehicle of {e} is a {v}."),
        ("Which vehicle does {e} own?", "What is the vehicle of {e}?"),
        lambda rng: f"{rng.choice(_COLOURS)} {rng.choice(_VEHICLES)}",
    ),
    Relation(
        "shelf",
        ("The files of {e} are on shelf {v}.", "Shelf {v} holds the files of {e}.", "{e} keeps its files on shelf {v}."),
        ("On which shelf are the files of {e}?", "Which shelf holds the files of {e}?"),
        _code,
    ),
    Relation(
        "partner",
        ("{e} works together with {v}.", "The partner of {e} is {v}.", "{v} is the partner of {e}."),
        ("Who is the partner of {e}?", "Who does {e} work together with?"),
        entity,
    ),
)


@dataclass(frozen=True)
class Fact:
    """One relation of one entity."""

    entity: str
    relation: Relation
    value: str

    def statement(self, rng: random.Random) -> str:
        """A sentence that states it."""
        return rng.choice(self.relation.statements).format(e=self.entity, v=self.value)

    def question(self, rng: random.Random) -> str:
        """A question that it answers."""
        return rng.choice(self.relation.questions).format(e=self.entity)


@dataclass(frozen=True)
class Sheet:
    """An entity and some facts about it."""

    entity: str
    facts: tuple[Fact, ...]


def draw_sheet(rng: random.Random, num_facts: int, name: str | None = None) -> Sheet:
    """A sheet of *num_facts* different relations (at most as many as there are)."""
    name = name or entity(rng)
    relations = rng.sample(RELATIONS, min(num_facts, len(RELATIONS)))
    return Sheet(name, tuple(Fact(name, relation, relation.value(rng)) for relation in relations))


def draw_sheets(rng: random.Random, num_facts: int) -> list[Sheet]:
    """Sheets of two to eight facts each, *num_facts* together, about different entities."""
    sheets: list[Sheet] = []
    names: set[str] = set()
    left = num_facts
    while left:
        name = entity(rng)
        if name in names:
            continue
        names.add(name)
        sheet = draw_sheet(rng, min(left, rng.randint(2, 8)), name)
        sheets.append(sheet)
        left -= len(sheet.facts)
    return sheets


def draw_question(rng: random.Random, sheets: list[Sheet], unanswerable: float = 0.12) -> tuple[str, str]:
    """A question and its answer; with probability *unanswerable* one that the sheets leave open."""
    sheet = rng.choice(sheets)
    if rng.random() < unanswerable:
        known = {fact.relation.name for fact in sheet.facts}
        open_relations = [relation for relation in RELATIONS if relation.name not in known]
        if rng.random() < 0.3 or not open_relations:
            stranger = Sheet(entity(rng), ())
            return rng.choice(rng.choice(RELATIONS).questions).format(e=stranger.entity), NOT_FOUND
        return rng.choice(rng.choice(open_relations).questions).format(e=sheet.entity), NOT_FOUND
    fact = rng.choice(sheet.facts)
    return fact.question(rng), fact.value


def render_document(rng: random.Random, sheet: Sheet) -> str:
    """The sheet as a short document: with or without heading, prose, lines or bullets."""
    sentences = [fact.statement(rng) for fact in sheet.facts]
    rng.shuffle(sentences)
    style = rng.random()
    if style < 0.6:
        body = " ".join(sentences)
    elif style < 0.8:
        body = "\n".join(sentences)
    else:
        body = "\n".join(f"- {sentence}" for sentence in sentences)
    heading = rng.random()
    if heading < 0.45:
        return f"# {sheet.entity}\n\n{body}"
    if heading < 0.6:
        return f"file_path: {sheet.entity.lower().replace(' ', '-')}.md\n\n{body}"
    return body
