"""Documents, passages and questions: a corpus that a few questions return to.

Everything follows from a seed. Sixty documents describe an institution each, section by section (its archive, its
mill, …), a section being a passage of 190 to 230 tokens. A question asks for facts of two or three sections, drawn from
a Zipf distribution over all of them: a few are asked about again and again, in ever other company, most never. BM25
finds four passages for each: those sections, and others that share words with the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from layerstream.demo.retrieval import Document, Passage, Retriever

from benchmarks.reader.facts import FILLERS, Fact, draw_sheet
from benchmarks.reader.names import UNIT_KINDS, word
from benchmarks.reader.relations import BY_KIND, UNIT

NUM_DOCUMENTS = 60
NUM_PASSAGES = 425
NUM_QUESTIONS = 20
NUM_RETRIEVED = 4
PASSAGE_TOKENS = range(190, 231)
SKEW = 1.6  # the passage of rank r is asked about in proportion to r**-SKEW
FACTS_ASKED = (2, 3)

Item = TypeVar("Item")
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Corpus:
    """What is indexed and asked.

    Attributes:
        documents: whole texts by name, for splitters.
        retriever: BM25 over the passages.
        questions: in the order in which they are asked.
    """

    documents: dict[str, str]
    retriever: Retriever
    questions: list[str]

    @property
    def passages(self) -> list[Passage]:
        """All of them, document by document."""
        return list(self.retriever.passages)

    def find(self, question: str) -> list[Passage]:
        """The passages for *question*, the best first."""
        return self.retriever.retrieve(question, NUM_RETRIEVED)


def draw_corpus(
    seed: int,
    count_tokens: CountTokens,
    num_documents: int = NUM_DOCUMENTS,
    num_passages: int = NUM_PASSAGES,
    num_questions: int = NUM_QUESTIONS,
) -> Corpus:
    """The corpus of *seed*.

    Args:
        count_tokens: tokens of a text, for the model that will read it.
    """
    rng = random.Random(f"reuse {seed}")
    names: list[str] = []
    while len(names) < num_documents:
        name = word(rng)
        if name not in names:
            names.append(name)
    sections: dict[str, list[tuple[list[Fact], str]]] = {}
    for number, name in enumerate(names):
        count = num_passages * (number + 1) // num_documents - num_passages * number // num_documents
        kinds = rng.sample(UNIT_KINDS, min(count, len(UNIT_KINDS)))
        sections[name] = [_section(rng, f"{name} {kind}", count_tokens) for kind in kinds]
    texts = {f"{name.lower()}.md": [text for _, text in parts] for name, parts in sections.items()}
    documents = [Document(name, "\n\n".join(parts)) for name, parts in texts.items()]
    limit = max(len(text) for parts in texts.values() for text in parts)
    retriever = Retriever(documents, limit=limit)
    ranked = [facts for parts in sections.values() for facts, _ in parts]
    rng.shuffle(ranked)
    questions: list[str] = []
    while len(questions) < num_questions:
        asked = [rng.choice(_zipf(rng, ranked)) for _ in range(rng.choice(FACTS_ASKED))]
        question = " ".join(dict.fromkeys(fact.question(rng) for fact in asked))
        if question not in questions:
            questions.append(question)
    return Corpus({document.name: document.text for document in documents}, retriever, questions)


def _section(rng: random.Random, entity: str, count_tokens: CountTokens) -> tuple[list[Fact], str]:
    """Facts about *entity* and a passage that states them, of as many tokens as a passage has."""
    while True:
        sheet = draw_sheet(rng, len(BY_KIND[UNIT]), UNIT, entity)
        goal = rng.choice(PASSAGE_TOKENS)
        facts: list[Fact] = []
        text = f"# {entity}\n"
        for fact in sheet.facts:
            longer = f"{text} {fact.statement(rng)}"
            if count_tokens(longer) > goal:
                break
            facts.append(fact)
            text = longer
        for filler in rng.sample(FILLERS, len(FILLERS)):
            if count_tokens(text) in PASSAGE_TOKENS:
                return facts, text
            if count_tokens(f"{text} {filler}") < PASSAGE_TOKENS.stop:
                text = f"{text} {filler}"


def _zipf(rng: random.Random, items: list[Item]) -> Item:
    return rng.choices(items, [rank**-SKEW for rank in range(1, len(items) + 1)])[0]
