"""Answers in a form: JSON that follows a schema, and calls of a tool that finds documents.

The prompts are those that LayerStream writes (``layerstream.chat.messages``), so that the reader meets what it learnt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from layerstream.chat.messages import SCHEMA_PROMPT, TOOLS_PROMPT

from benchmarks.reader.facts import Fact, Sheet, draw_question, draw_sentences, draw_sheets, render_document

_ABOUT = (
    "Tell me about {e}.",
    "Extract what the context says about {e}.",
    "Fill in the form for {e}.",
    "What do you know about {e}?",
)
_IN_JSON = ("\n\nAnswer in JSON.", " Answer with JSON.", " Return JSON and nothing else.")
_TITLES = ("Answer", "Unit", "Entry", "Form", "Facts", "Record")
_TOOLS = (
    ("search", "query", "Finds documents about something."),
    ("find", "topic", "Finds what is written about a topic."),
    ("look_up", "name", "Looks a name up in the documents."),
    ("search_documents", "query", "Search the documents."),
    ("find_documents", "query", "The documents that match a query."),
    ("get_page", "title", "The page with this title."),
)
_OTHER_TOOLS = (
    ("add", {"a": {"type": "integer"}, "b": {"type": "integer"}}, "Adds two numbers."),
    ("now", {}, "The time."),
    ("send_mail", {"to": {"type": "string"}, "text": {"type": "string"}}, "Sends a mail."),
)

Pieces = list[tuple[str, bool]]


def draw_json(rng: random.Random, systems: Sequence[str], num_facts: int, num_turns: int) -> Pieces:
    """A chat about one context whose answers are JSON."""
    sheets = draw_sheets(rng, num_facts)
    context = "\n\n".join(_document(rng, sheet) for sheet in sheets)
    pieces: Pieces = [("<|bos|><|system|>" + rng.choice(systems).format(context=context) + "<|end|>", False)]
    for _ in range(num_turns):
        question, answer = _ask_for_one(rng, sheets) if rng.random() < 0.4 else _ask_for_many(rng, rng.choice(sheets))
        if rng.random() < 0.9:
            question += SCHEMA_PROMPT.format(schema=json.dumps(_schema_of(rng, answer)))
        else:
            question += rng.choice(_IN_JSON)
        pieces.append((f"<|user|>{question}<|end|><|assistant|>", False))
        pieces.append((json.dumps(answer, ensure_ascii=False) + "<|end|>", True))
    return pieces


def draw_tools(rng: random.Random, num_turns: int) -> Pieces:
    """A chat with tools: a question, a call, what it brings, the answer."""
    name, argument, description = rng.choice(_TOOLS)
    tools = [_tool(rng, name, {argument: {"type": "string"}}, description)]
    if rng.random() < 0.3:
        other, arguments, about = rng.choice(_OTHER_TOOLS)
        tools.insert(rng.randint(0, 1), _tool(rng, other, arguments, about))
    pieces: Pieces = [
        (
            "<|bos|><|system|>" + TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool) for tool in tools)) + "<|end|>",
            False,
        )
    ]
    for sheet in draw_sheets(rng, 5 * num_turns)[:num_turns]:
        question, answer = draw_question(rng, [sheet], unanswerable=0.1)
        if sheet.entity not in question:
            continue
        call = json.dumps({"name": name, "arguments": {argument: sheet.entity}}, ensure_ascii=False)
        found = "\n\n".join(_document(rng, other) for other in [sheet, *draw_sheets(rng, rng.randint(2, 6))[:1]])
        pieces += [
            (f"<|user|>{question}<|end|><|assistant|>", False),
            (f"<tool_call>\n{call}\n</tool_call><|end|>", True),
            (f"<|user|><tool_response>\n{found}\n</tool_response><|end|><|assistant|>", False),
            (f"{answer}<|end|>", True),
        ]
    return pieces


def _document(rng: random.Random, sheet: Sheet) -> str:
    return render_document(sheet.entity, draw_sentences(sheet.facts, rng), rng)


def _ask_for_one(rng: random.Random, sheets: Sequence[Sheet]) -> tuple[str, dict[str, Any]]:
    question, answer = draw_question(rng, sheets)
    return question, {rng.choice(("answer", "answer", "value", "result")): answer}


def _ask_for_many(rng: random.Random, sheet: Sheet) -> tuple[str, dict[str, Any]]:
    facts = rng.sample(sheet.facts, rng.randint(1, min(5, len(sheet.facts))))
    named = {"name": sheet.entity} if rng.random() < 0.5 else {}
    return rng.choice(_ABOUT).format(e=sheet.entity), {**named, **{_key(rng, fact): _value(fact) for fact in facts}}


def _key(rng: random.Random, fact: Fact) -> str:
    name = fact.relation.name.replace(" ", "_")
    return rng.choice((name, name, name, f"{name}_of_it" if rng.random() < 0.1 else name))


def _value(fact: Fact) -> str | int:
    return int(fact.value) if fact.value.isdigit() and not fact.value.startswith("0") else fact.value


def _schema_of(rng: random.Random, answer: dict[str, Any]) -> dict[str, Any]:
    properties = {
        key: {"title": key.replace("_", " ").title(), "type": "integer" if isinstance(value, int) else "string"}
        if rng.random() < 0.7
        else {"type": "integer" if isinstance(value, int) else "string"}
        for key, value in answer.items()
    }
    title = rng.choice(_TITLES)
    about = {"description": f"{title}."} if rng.random() < 0.5 else {}
    schema = {**about, "properties": properties, "required": list(answer), "title": title, "type": "object"}
    return {**schema, "additionalProperties": False} if rng.random() < 0.7 else schema


def _tool(rng: random.Random, name: str, properties: dict[str, Any], description: str) -> dict[str, Any]:
    if rng.random() < 0.5:
        properties = {key: {"title": key.title(), **value} for key, value in properties.items()}
    parameters = {"type": "object", "properties": properties}
    if properties:
        parameters["required"] = list(properties)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
