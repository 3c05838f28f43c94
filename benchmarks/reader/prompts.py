"""The prompts around the facts: what chat front ends and retrieval frameworks put between context and question."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.reader.facts import draw_question, draw_sheets, render_document

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BOS, END, *ROLES.values()]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_PLAIN_SYSTEM = (
    "You answer questions from the given context.",
    "Answer from the context only. If it is not there, say so.",
    "You are a helpful assistant.",
)
_LLAMA_INDEX_SYSTEM = (
    "You are an expert Q&A system that is trusted around the world.\nAlways answer the query using the provided context "
    "information, and not prior knowledge.\nSome rules to follow:\n1. Never directly reference the given context in your "
    "answer.\n2. Avoid statements like 'Based on the context, ...' or 'The context information ...' or anything along "
    "those lines."
)
_LLAMA_INDEX_USER = (
    "Context information is below.\n---------------------\n{context}\n---------------------\nGiven the context "
    "information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
)
_CONTEXT_FIRST = (
    "Context:\n{context}\n\nQuestion: {question}",
    "{context}\n\n{question}",
    "{context}\n\nQuestion: {question}\nAnswer:",
    "Use the following context to answer the question.\n\n{context}\n\nQuestion: {question}",
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say that "
    "you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:",
)


@dataclass(frozen=True)
class Sample:
    """Text pieces in order; those marked are answers."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(text for text, _ in self.pieces)


def draw_context(rng: random.Random, num_facts: int) -> tuple[str, list[tuple[str, str]]]:
    """A context of *num_facts* facts and up to six questions about it, with answers."""
    sheets = draw_sheets(rng, num_facts)
    context = "\n\n".join(render_document(rng, sheet) for sheet in sheets)
    questions = list(dict([draw_question(rng, sheets) for _ in range(6)]).items())
    return context, questions


def draw_sample(rng: random.Random, num_facts: int) -> Sample:
    """A context with its questions in one of the forms that the reader will meet."""
    context, questions = draw_context(rng, num_facts)
    form = rng.random()
    if form < 0.2:
        return _completion(context, questions)
    first, rest = questions[0], questions[1:]
    pieces: list[tuple[str, bool]] = [(BOS, False)]
    if form < 0.4:
        pieces.append((ROLES["system"] + _LLAMA_INDEX_SYSTEM + END, False))
        user = _LLAMA_INDEX_USER
    else:
        if rng.random() < 0.4:
            pieces.append((ROLES["system"] + rng.choice(_PLAIN_SYSTEM) + END, False))
        user = rng.choice(_CONTEXT_FIRST)
    pieces.append((ROLES["user"] + user.format(context=context, question=first[0]) + END + ROLES["assistant"], False))
    pieces.append((first[1] + END, True))
    for question, answer in rest:
        pieces.append((ROLES["user"] + question + END + ROLES["assistant"], False))
        pieces.append((answer + END, True))
    return Sample(tuple(pieces))


def _completion(context: str, questions: list[tuple[str, str]]) -> Sample:
    """Without a chat template: the answer follows the word."""
    pieces: list[tuple[str, bool]] = [(f"{BOS}{context}", False)]
    for question, answer in questions:
        pieces.append((f"\n\nQuestion: {question}\nAnswer:", False))
        pieces.append((f" {answer}{END}", True))
    return Sample(tuple(pieces))
