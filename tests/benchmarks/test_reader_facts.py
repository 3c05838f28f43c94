"""What the reader is trained on says what it claims to say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from layerstream.chat.messages import plain_messages
from layerstream.chat.tools import select_tools
from layerstream.chat.turn import TurnMaker
from layerstream.checkpoint.hub import bundled_reader
from layerstream.text.prompt import PromptEncoder
from transformers import AutoTokenizer

from benchmarks.reader.documents import UNITS, write_demo
from benchmarks.reader.facts import (
    NOT_FOUND,
    Fact,
    draw_question,
    draw_sentences,
    draw_sheets,
    render_document,
    write_sentences,
)
from benchmarks.reader.prompts import END, FORMS, WRAPPERS, draw_sample
from benchmarks.reader.relations import BY_KIND, BY_NAME, RELATIONS

SEEDS = range(30)
"""Enough draws to meet every wrapper, kind and form of question."""


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *FORMS, None])
def test_samples_follow_from_the_seed(wrapper: str | None) -> None:
    for seed in SEEDS:
        first, second = (draw_sample(random.Random(seed), 12, wrapper) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("num_facts", [4, 20, 60])
def test_number_of_facts_and_names(num_facts: int) -> None:
    for seed in SEEDS:
        sheets = draw_sheets(random.Random(seed), num_facts)
        assert sum(len(sheet.facts) for sheet in sheets) == num_facts
        assert len({sheet.entity for sheet in sheets}) == len(sheets)
        for sheet in sheets:
            assert len({fact.relation.name for fact in sheet.facts}) == len(sheet.facts)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_answer_is_in_its_context(wrapper: str) -> None:
    for seed in SEEDS:
        pieces = draw_sample(random.Random(seed), 20, wrapper).pieces
        prompt = pieces[0][0]
        answers = [text for text, is_answer in pieces if is_answer]
        assert answers
        assert all(answer.endswith(END) for answer in answers)
        for answer in (text.removesuffix(END).strip() for text in answers):
            assert answer in prompt or answer == NOT_FOUND


def test_open_questions_are_really_open() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        sheets = draw_sheets(rng, 20)
        stated = {(fact.entity, fact.relation.name) for sheet in sheets for fact in sheet.facts}
        answered = {question for e, name in stated for question in questions_about(e, name)}
        for _ in range(20):
            question, answer = draw_question(rng, sheets, unanswerable=1.0)
            assert answer == NOT_FOUND
            plain = question.removeprefix("Please tell me: ").rstrip("?") + "?"
            assert plain not in answered


def questions_about(entity: str, relation: str) -> list[str]:
    return [question.format(e=entity) for question in BY_NAME[relation].questions]


def test_relations_are_told_apart() -> None:
    for relations in BY_KIND.values():
        questions = [question for relation in relations for question in relation.questions]
        assert len(set(questions)) == len(questions)
    for relation in RELATIONS:
        assert all("{v}" in text and "{e}" not in text for text in relation.predicates)
        assert all("{v}" in text and "{e}" in text for text in relation.sentences)
        assert all("{e}" in text and "{v}" not in text for text in relation.questions)


def test_documents_state_all_facts() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        for sheet in draw_sheets(rng, 12):
            page = render_document(sheet.entity, draw_sentences(sheet.facts, rng), rng)
            assert all(fact.value in page for fact in sheet.facts)


def test_two_facts_can_share_a_sentence() -> None:
    facts = [Fact("Brenvik", BY_NAME["location"], "Tolm"), Fact("Brenvik", BY_NAME["founded"], "1987")]
    (sentence,) = write_sentences(random.Random(0), facts, joined=1.0, filler=0.0)
    assert sentence.startswith("Brenvik ")
    assert " and " in sentence
    assert sentence.count("Brenvik") == 1


def test_demo_documents_hold_the_answers(tmp_path: Path) -> None:
    write_demo(tmp_path / "documents", tmp_path / "questions.json")
    pages = {page.name: page.read_text() for page in (tmp_path / "documents").iterdir()}
    assert len(pages) == 20
    assert f"{UNITS[0].lower()}.md" in pages
    assert all(60 <= len(page.split()) <= 180 for page in pages.values())
    entries = json.loads((tmp_path / "questions.json").read_text())
    assert len(entries) == 12
    assert sum(entry["document"] is None for entry in entries) == 1
    for entry in entries:
        if entry["document"] is None:
            assert entry["answer"] == NOT_FOUND
        else:
            assert entry["answer"] in pages[entry["document"]]


def test_answers_in_json_are_json_about_the_context() -> None:
    for seed in SEEDS:
        context, *turns = draw_sample(random.Random(seed), 12, "JSON").pieces
        answers = [text.removesuffix(END) for text, is_answer in turns if is_answer]
        assert answers
        for values in (json.loads(answer).values() for answer in answers):
            assert all(str(value) in context[0] or value == NOT_FOUND for value in values)


def test_lessons_with_tools_are_the_prompts_that_the_engine_writes() -> None:
    """A chat of a lesson, rendered by the engine for the bundled reader, is the lesson's text."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_reader())
    turns = TurnMaker(PromptEncoder(tokenizer, max_context=None), tokenizer, dict)
    for seed in SEEDS:
        text = draw_sample(random.Random(seed), 12, "tools").text
        tools = [json.loads(line) for line in text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()]
        parts = [part.split("|>", 1) for part in text.split("<|bos|>")[1].split("<|end|>") if part]
        messages = [{"role": role.removeprefix("<|"), "content": content} for role, content in parts[1:-1]]
        told = turns._render(plain_messages(messages), select_tools(tools, "none"), is_native=False)
        assert text.startswith(told)
