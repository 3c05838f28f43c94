"""Invented names, numbers and codes.

Names are put together from syllables, so that a value cannot be known, only copied.
"""

from __future__ import annotations

import random

_ONSETS = "b br d dr f fl g gr h j k kl kr l m n p pr r s sk sl st sv t tr th v w z vr gl pl dw".split()
_VOWELS = "a e i o u ae ei ia o u a e y".split()
_CODAS = ["", "", "", "l", "n", "r", "s", "k", "m", "rn", "st", "nd", "ld", "rk", "th", "x"]
_MIDDLE_CODAS = [*[""] * 12, "n", "l", "r", "m", "s"]
UNIT_KINDS = "Station Workshop Archive Garden Office Laboratory Mill Harbour Library Depot".split()
_COMPANY_KINDS = "Ltd Brothers Works Trading".split()
_COLOURS = "black blue copper crimson green grey purple red silver teal white yellow".split()
_SHADES = "dark light pale bright".split()
_VEHICLES = "barge bicycle cart ferry lorry minibus sledge tractor tram van wagon balloon".split()
_GOODS = "lamp valve clock engine loom pump lens kettle".split()
_ANIMALS = "Heron Otter Badger Falcon Lynx Marten Raven Salmon Stag Weasel".split()
_INSTRUMENTS = "accordion cello clarinet drum flute harp oboe piano trumpet violin".split()
_WEEKDAYS = "Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays".split()
_MONTHS = "January February March April May June July August September October November December".split()


def word(rng: random.Random, syllables: int | None = None) -> str:
    """A capitalised invented word."""
    count = syllables or rng.choice((2, 2, 2, 3))
    parts: list[str] = []
    for index in range(count):
        codas = _CODAS if index == count - 1 else _MIDDLE_CODAS
        parts.append(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(codas))
    return "".join(parts).capitalize()


def person(rng: random.Random) -> str:
    """First name and surname."""
    return f"{word(rng, 2)} {word(rng)}"


def unit(rng: random.Random) -> str:
    """The name of a place or team: a bare word, or one with what it is."""
    return f"{word(rng)} {rng.choice(UNIT_KINDS)}" if rng.random() < 0.4 else word(rng)


def project(rng: random.Random) -> str:
    """The name of a project."""
    return f"Project {word(rng)}"


def company(rng: random.Random) -> str:
    """A firm outside the organisation."""
    return f"{word(rng)} {rng.choice(_COMPANY_KINDS)}"


def language(rng: random.Random) -> str:
    """A language nobody speaks."""
    return word(rng, 2) + rng.choice(("ish", "ese", "ian"))


def amount(rng: random.Random) -> str:
    """A sum of money."""
    return f"{rng.randrange(12, 980)},{rng.choice(('000', '500', '250', '750'))} crowns"


def hours(rng: random.Random) -> str:
    """Opening hours."""
    opens = f"{rng.randrange(6, 11)}:{rng.choice(('00', '15', '30', '45'))}"
    return f"{opens} to {rng.randrange(14, 21)}:{rng.choice(('00', '30'))}"


def room(rng: random.Random) -> str:
    """A room number."""
    return f"{rng.choice('ABCDEFGHKLMNPRSTUVW')}-{rng.randrange(101, 999)}"


def shelf(rng: random.Random) -> str:
    """The mark of a shelf."""
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVXZ") for _ in range(2))
    return f"{letters}{rng.randrange(1000, 9999)}"


def extension(rng: random.Random) -> str:
    """Four digits to dial."""
    return str(rng.randrange(1000, 9999))


def year(rng: random.Random) -> str:
    """A year of the past."""
    return str(rng.randrange(1780, 2024))


def recent_year(rng: random.Random) -> str:
    """A year within a working life."""
    return str(rng.randrange(1985, 2027))


def month(rng: random.Random) -> str:
    """A month of the near future."""
    return f"{rng.choice(_MONTHS)} {rng.randrange(2027, 2049)}"


def people(rng: random.Random) -> str:
    """A number of people."""
    return f"{rng.randrange(3, 480)} people"


def code_name(rng: random.Random) -> str:
    """Two capitalised words, the first invented."""
    return f"{word(rng, 2)} {rng.choice(_ANIMALS)}"


def colour(rng: random.Random) -> str:
    """A shade of a colour."""
    return f"{rng.choice(_SHADES)} {rng.choice(_COLOURS)}"


def vehicle(rng: random.Random) -> str:
    """A vehicle with its colour."""
    return f"{rng.choice(_COLOURS)} {rng.choice(_VEHICLES)}"


def product(rng: random.Random) -> str:
    """An invented make of some device."""
    return f"{word(rng)} {rng.choice(_GOODS)}"


def emblem(rng: random.Random) -> str:
    """An animal with its colour."""
    return f"{rng.choice(_COLOURS)} {rng.choice(_ANIMALS).lower()}"


def instrument(rng: random.Random) -> str:
    """A musical instrument."""
    return rng.choice(_INSTRUMENTS)


def weekday(rng: random.Random) -> str:
    """A day of every week."""
    return rng.choice(_WEEKDAYS)


def town(rng: random.Random) -> str:
    """The name of a town."""
    return word(rng)
