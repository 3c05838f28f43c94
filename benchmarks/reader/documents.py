"""Writes the demo's documents: twenty short pages about one invented organisation, and questions about them.

    python -m benchmarks.reader.documents DOCUMENTS_FOLDER QUESTIONS_FILE

Units, projects and people know each other: who leads a unit has a page, and the page names the unit. The names are
of the kind that training draws; what is said of them comes from a seed that no training run uses.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.reader.facts import NOT_FOUND, Fact, Sheet, draw_sheet, file_name, write_sentences
from benchmarks.reader.relations import BY_NAME, PERSON, PROJECT, UNIT

UNITS = (
    "Brenvik",
    "Tolmar Archive",
    "Gukrand",
    "Hovesk Garden",
    "Drafnor Depot",
    "Jaskeld",
    "Pelvast Library",
    "Stirwen Mill",
    "Vanorth",
)
PROJECTS = ("Project Kelmast", "Project Drusveld", "Project Walnora", "Project Plimar", "Project Frostag")
PEOPLE = ("Tolmund Varek", "Sluba Merkast", "Hokil Prastend", "Krane Lukofy", "Thura Plasner", "Vrelin Dovast")
FACTS_PER_SHEET = (7, 8)
FEWEST_WORDS = 60
_ASKED = (
    *((UNIT, relation) for relation in ("founded", "location", "supplier", "hours")),
    *((PROJECT, relation) for relation in ("leader", "deadline", "client")),
    *((PERSON, relation) for relation in ("language", "office", "hometown")),
)


@dataclass(frozen=True)
class Question:
    """A question about the documents, its answer, and the document that holds it (``None`` if none does)."""

    question: str
    answer: str
    document: str | None


def draw_organisation(rng: random.Random) -> list[Sheet]:
    """Sheets of units, projects and people with different names that refer to each other."""
    sheets = [_sheet(rng, UNIT, unit, {"leader": PEOPLE[i % len(PEOPLE)]}) for i, unit in enumerate(UNITS)]
    for project in PROJECTS:
        sheets.append(_sheet(rng, PROJECT, project, {"leader": rng.choice(PEOPLE), "parent": rng.choice(UNITS)}))
    for index, name in enumerate(PEOPLE):
        sheets.append(_sheet(rng, PERSON, name, {"team": UNITS[index]}))
    return sheets


def _sheet(rng: random.Random, kind: str, name: str, given: dict[str, str]) -> Sheet:
    """A sheet of *name* with the asked and the given relations among its facts."""
    asked = {relation for of_kind, relation in _ASKED if of_kind == kind}
    full = draw_sheet(rng, len(BY_NAME), kind, name)
    facts = [replace(f, value=given.get(f.relation.name, f.value)) for f in full.facts]
    facts.sort(key=lambda fact: fact.relation.name not in asked | given.keys())
    chosen = facts[: rng.choice(FACTS_PER_SHEET)]
    rng.shuffle(chosen)
    return Sheet(name, kind, tuple(chosen))


def write_page(rng: random.Random, sheet: Sheet) -> str:
    """A page of at least :data:`FEWEST_WORDS` words: a heading and two paragraphs, the second at times a list."""
    page = ""
    while len(page.split()) < FEWEST_WORDS or _repeats(page):
        sentences = write_sentences(rng, sheet.facts, joined=0.2, filler=0.35)
        middle = (len(sentences) + 1) // 2
        first, second = " ".join(sentences[:middle]), sentences[middle:]
        rest = "\n".join(f"- {sentence}" for sentence in second) if rng.random() < 0.3 else " ".join(second)
        page = f"# {sheet.entity}\n\n{first}\n\n{rest}\n"
    return page


def _repeats(page: str) -> bool:
    """Whether a sentence stands twice."""
    sentences = [sentence.strip("- ") for sentence in page.replace("\n", ". ").split(". ") if sentence.strip("- ")]
    return len(set(sentences)) < len(sentences)


def draw_questions(rng: random.Random, sheets: list[Sheet]) -> list[Question]:
    """Who leads the first unit, one question for each of the asked relations, and one that no document answers."""
    (first,) = (f for f in _facts(sheets, UNIT, "leader") if f.entity == UNITS[0])
    questions = [Question(f"Who leads {first.entity}?", first.value, file_name(first.entity))]
    used = {first.entity}
    for kind, relation in _ASKED:
        fact = rng.choice([f for f in _facts(sheets, kind, relation) if f.entity not in used])
        used.add(fact.entity)
        questions.append(Question(fact.question(rng), fact.value, file_name(fact.entity)))
    sheet = rng.choice([s for s in sheets if s.kind == UNIT and all(f.relation.name != "emblem" for f in s.facts)])
    questions.append(Question(BY_NAME["emblem"].questions[0].format(e=sheet.entity), NOT_FOUND, None))
    return questions


def _facts(sheets: list[Sheet], kind: str, relation: str) -> list[Fact]:
    """The facts of one relation over all sheets of a kind."""
    return [f for sheet in sheets if sheet.kind == kind for f in sheet.facts if f.relation.name == relation]


def write_demo(folder: Path, questions_file: Path, seed: str = "demo documents") -> None:
    """Write all pages to *folder* and the questions to *questions_file*."""
    rng = random.Random(seed)
    sheets = draw_organisation(rng)
    folder.mkdir(parents=True, exist_ok=True)
    for sheet in sheets:
        (folder / file_name(sheet.entity)).write_text(write_page(rng, sheet), encoding="utf-8")
    entries = [vars(question) for question in draw_questions(rng, sheets)]
    questions_file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("questions", type=Path)
    options = parser.parse_args()
    write_demo(options.documents, options.questions)


if __name__ == "__main__":
    main()
