"""Fact sheets about invented entities: drawing them, asking about them, writing them as documents.

Everything follows from the random generator that is passed in: the same seed gives the same facts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.reader.names import UNIT_KINDS
from benchmarks.reader.relations import BY_KIND, DRAW_NAME, PERSON, PROJECT, UNIT, Relation

NOT_FOUND = "Not in the context."
FILLERS = (
    "This page is kept by the registry.",
    "Please tell the registry when something changes.",
    "Visitors are asked to sign the book at the door.",
    "The figures were checked last spring.",
    "Everything else is decided at the yearly meeting.",
    "Older papers are kept in the cellar.",
    "Lunch is served at noon.",
    "New colleagues receive a short tour on their first day.",
    "Letters are answered within a week.",
    "Coats can be left near the entrance.",
    "A map hangs beside the stairs.",
    "Nobody remembers who chose the carpet.",
    "Guests are always welcome.",
    "The lift is slow, so most people take the stairs.",
    "Questions are best asked in the morning.",
    "In winter, the path is cleared before dawn.",
)
LISTINGS = (
    "List everything that the context says about {e}.",
    "What does the context say about {e}?",
    "Tell me everything about {e}.",
    "What is known about {e}?",
)


@dataclass(frozen=True)
class Fact:
    """One relation of one entity."""

    entity: str
    relation: Relation
    value: str

    def statement(self, rng: random.Random) -> str:
        """A sentence that states it."""
        predicates = [f"{self.entity} {predicate}." for predicate in self.relation.predicates]
        forms = [template.format(e=self.entity, v=self.value) for template in (*predicates, *self.relation.sentences)]
        return rng.choice(forms)

    def predicate(self, rng: random.Random) -> str:
        """What follows the entity in a sentence."""
        return rng.choice(self.relation.predicates).format(v=self.value)

    def question(self, rng: random.Random) -> str:
        """A question that it answers."""
        return ask(rng, self.relation, self.entity)


@dataclass(frozen=True)
class Sheet:
    """An entity of some kind and what is said of it."""

    entity: str
    kind: str
    facts: tuple[Fact, ...]


def ask(rng: random.Random, relation: Relation, entity: str) -> str:
    """A question after *relation* of *entity*."""
    return rng.choice(relation.questions).format(e=entity)


def draw_sheet(rng: random.Random, num_facts: int, kind: str, name: str | None = None) -> Sheet:
    """A sheet of *num_facts* different relations (at most as many as *kind* has)."""
    name = name or DRAW_NAME[kind](rng)
    relations = rng.sample(BY_KIND[kind], min(num_facts, len(BY_KIND[kind])))
    return Sheet(name, kind, tuple(Fact(name, relation, relation.value(rng)) for relation in relations))


def draw_sheets(rng: random.Random, num_facts: int) -> list[Sheet]:
    """Sheets of two to eight facts each, *num_facts* together, about different entities.

    Some entities were named as a value of an earlier sheet, and some share a word with another one.
    """
    sheets: list[Sheet] = []
    taken: set[str] = set()
    left = num_facts
    while left:
        kind, name = _draw_entity(rng, sheets)
        if name in taken:
            continue
        taken.add(name)
        sheet = draw_sheet(rng, min(left, rng.randint(2, 8)), kind, name)
        sheets.append(sheet)
        left -= len(sheet.facts)
    return sheets


def _draw_entity(rng: random.Random, sheets: Sequence[Sheet]) -> tuple[str, str]:
    """Kind and name of one more entity."""
    choice = rng.random()
    if sheets and choice < 0.25:
        named = [(f.relation.value_kind, f.value) for sheet in sheets for f in sheet.facts if f.relation.value_kind]
        if named:
            kind, name = rng.choice(named)
            return kind or UNIT, name
    if sheets and choice > 0.95:
        siblings = [sheet.entity for sheet in sheets if sheet.entity.split()[-1] in UNIT_KINDS]
        if siblings:
            return UNIT, f"{rng.choice(siblings).split()[0]} {rng.choice(UNIT_KINDS)}"
    kind = rng.choices((UNIT, PROJECT, PERSON), (0.6, 0.2, 0.2))[0]
    return kind, DRAW_NAME[kind](rng)


def draw_question(rng: random.Random, sheets: Sequence[Sheet], unanswerable: float = 0.15) -> tuple[str, str]:
    """A question and its answer; with probability *unanswerable* one that the sheets leave open.

    Open questions are mostly near misses: a known entity without that relation. The others name a stranger.
    """
    sheet = rng.choice(sheets)
    if rng.random() >= unanswerable:
        fact = rng.choice(sheet.facts)
        return _vary(rng, fact.question(rng)), fact.value
    known = {fact.relation.name for fact in sheet.facts}
    missing = [relation for relation in BY_KIND[sheet.kind] if relation.name not in known]
    if missing and rng.random() < 0.7:
        return _vary(rng, ask(rng, rng.choice(missing), sheet.entity)), NOT_FOUND
    taken = {other.entity for other in sheets}
    stranger = DRAW_NAME[sheet.kind](rng)
    while stranger in taken:
        stranger = DRAW_NAME[sheet.kind](rng)
    return _vary(rng, ask(rng, rng.choice(BY_KIND[sheet.kind]), stranger)), NOT_FOUND


def draw_listing(rng: random.Random, entity: str, sentences: Sequence[str]) -> tuple[str, str]:
    """A request for all that is said about *entity*, and the answer: its *sentences* without the fillers."""
    return rng.choice(LISTINGS).format(e=entity), " ".join(line for line in sentences if line not in FILLERS)


def _vary(rng: random.Random, question: str) -> str:
    """The question as it is, or now and then with a polite start or without its mark."""
    choice = rng.random()
    if choice < 0.05:
        return f"Please tell me: {question}"
    if choice < 0.1:
        return question.rstrip("?")
    return question


def write_sentences(rng: random.Random, facts: Sequence[Fact], joined: float = 0.1, filler: float = 0.1) -> list[str]:
    """Sentences that state *facts* in their order.

    Args:
        joined: how often two facts share a sentence ("X lies in Y and is led by Z.").
        filler: how often a sentence that states nothing comes in between.
    """
    sentences: list[str] = []
    position = 0
    while position < len(facts):
        fact = facts[position]
        following = facts[position + 1] if position + 1 < len(facts) else None
        if following is not None and rng.random() < joined:
            sentences.append(f"{fact.entity} {fact.predicate(rng)} and {following.predicate(rng)}.")
            position += 2
        else:
            sentences.append(fact.statement(rng))
            position += 1
        if rng.random() < filler:
            sentences.append(rng.choice(FILLERS))
    return sentences


def draw_sentences(facts: Sequence[Fact], rng: random.Random) -> list[str]:
    """The sentences of a document that states *facts*."""
    return write_sentences(rng, facts, filler=rng.choice((0.0, 0.0, 0.1, 0.3)))


def render_document(entity: str, sentences: Sequence[str], rng: random.Random) -> str:
    """A short document about *entity*: with or without heading, as prose, lines, bullets or prose and bullets."""
    middle = (len(sentences) + 1) // 2
    bullets = [f"- {sentence}" for sentence in sentences]
    style = rng.random()
    if style < 0.45 or len(sentences) < 3:
        body = " ".join(sentences)
    elif style < 0.65:
        body = " ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:])
    elif style < 0.75:
        body = " ".join(sentences[:middle]) + "\n\n" + "\n".join(bullets[middle:])
    elif style < 0.85:
        body = "\n".join(sentences)
    else:
        body = "\n".join(bullets)
    heading = rng.random()
    if heading < 0.45:
        return f"# {entity}\n\n{body}"
    if heading < 0.5:
        return f"{entity}\n\n{body}"
    return body


def file_name(entity: str) -> str:
    """The name that a document about *entity* is stored under."""
    return entity.lower().replace(" ", "-") + ".md"
