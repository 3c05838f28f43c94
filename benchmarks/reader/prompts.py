"""The prompts around the facts: what chat front ends and retrieval frameworks put between context and question."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reader import forms
from benchmarks.reader.facts import draw_listing, draw_question, draw_sentences, draw_sheets, file_name, render_document

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
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
    "You are an expert Q&A system that is trusted around the world.\nAlways answer the query using the provided "
    "context information, and not prior knowledge.\nSome rules to follow:\n1. Never directly reference the given "
    "context in your answer.\n2. Avoid statements like 'Based on the context, ...' or 'The context information ...' "
    "or anything along those lines."
)
_LLAMA_INDEX = (
    "Context information is below.\n---------------------\n{context}\n---------------------\nGiven the context "
    "information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
)
_STUFF_SYSTEM = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, say that you don't know. Use three sentences maximum and keep the answer "
    "concise.\n\n{context}",
    "Use the given context to answer the question. If you don't know the answer, say you don't know.\n\n"
    "Context: {context}",
    "Answer any user questions based solely on the context below:\n\n<context>\n{context}\n</context>",
)
_LABELLED = "{context}\n\nQuestion: {question}\nAnswer:"
_HELPFUL = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)
_CONTEXT_FIRST = (
    "Context:\n{context}\n\nQuestion: {question}",
    "{context}\n\n{question}",
    _LABELLED,
    "Use the following context to answer the question at the end.\n\n{context}\n\nQuestion: {question}",
    "Answer the question based only on the following context:\n{context}\n\nQuestion: {question}\n",
    _HELPFUL,
)
_COMPLETION = (_LABELLED, _HELPFUL, _LLAMA_INDEX, "Context:\n" + _LABELLED)
_ROOTS = ("", "", "docs/", "data/documents/", "/home/user/documents/", "/srv/layerstream/demo/documents/")

Dialogue = list[tuple[str, str]]
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Sample:
    """Text pieces in order; those marked are answers."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(text for text, _ in self.pieces)


def llama_index_chat(rng: random.Random, context: str, turns: Dialogue) -> Pieces:
    """LlamaIndex's text-QA template for chat models, with its system message."""
    head = BOS + SYSTEM + _LLAMA_INDEX_SYSTEM + END if rng.random() < 0.7 else BOS
    return _chat(head, _LLAMA_INDEX.format(context=context, question=turns[0][0]), turns)


def langchain_chat(rng: random.Random, context: str, turns: Dialogue) -> Pieces:
    """LangChain's stuff chain: the context in the system message, the question as the user's."""
    head = BOS + SYSTEM + rng.choice(_STUFF_SYSTEM).format(context=context) + END
    return _chat(head, turns[0][0], turns)


def plain_chat(rng: random.Random, context: str, turns: Dialogue) -> Pieces:
    """Context and question in the first user message."""
    head = BOS + SYSTEM + rng.choice(_PLAIN_SYSTEM) + END if rng.random() < 0.4 else BOS
    return _chat(head, rng.choice(_CONTEXT_FIRST).format(context=context, question=turns[0][0]), turns)


def completion(rng: random.Random, context: str, turns: Dialogue) -> Pieces:
    """Without chat template, with or without BOS: the answer follows the prompt's last word."""
    template = rng.choice(_COMPLETION)
    pieces: Pieces = []
    for position, (question, answer) in enumerate(turns):
        if position == 0:
            prompt = rng.choice((BOS, "")) + template.format(context=context, question=question)
        else:
            prompt = f"\n\nQuestion: {question}\nAnswer:"
        pieces.append((prompt, False))
        pieces.append((answer + END if prompt.endswith(" ") else f" {answer}{END}", True))
    return pieces


def _chat(head: str, first_message: str, turns: Dialogue) -> Pieces:
    """The turns in chat format; the first user message is given, the others are bare questions."""
    pieces: Pieces = []
    for position, (question, answer) in enumerate(turns):
        prompt = head + USER + first_message if position == 0 else USER + question
        pieces.append((prompt + END + ASSISTANT, False))
        pieces.append((answer + END, True))
    return pieces


WRAPPERS: dict[str, Callable[[random.Random, str, Dialogue], Pieces]] = {
    "plain chat": plain_chat,
    "LangChain chat": langchain_chat,
    "LlamaIndex chat": llama_index_chat,
    "completion": completion,
}
_WEIGHTS = (0.35, 0.2, 0.2, 0.25)
FORMS = ("JSON", "tools")


def draw_context(
    rng: random.Random, num_facts: int, unanswerable: float = 0.15, num_questions: int = 6, listings: float = 0.0
) -> tuple[str, Dialogue]:
    """A context of *num_facts* facts and up to *num_questions* different questions about it, with answers.

    A share of *listings* of the questions asks for all that is said about an entity.
    """
    sheets = draw_sheets(rng, num_facts)
    metadata = _draw_metadata(rng)
    documents: list[str] = []
    said: list[tuple[str, list[str]]] = []
    for sheet in sheets:
        sentences = draw_sentences(sheet.facts, rng)
        documents.append(metadata(sheet.entity) + render_document(sheet.entity, sentences, rng))
        said.append((sheet.entity, sentences))
    turns: dict[str, str] = {}
    for _ in range(num_questions):
        is_listing = listings > 0 and rng.random() < listings
        question, answer = (
            draw_listing(rng, *rng.choice(said)) if is_listing else draw_question(rng, sheets, unanswerable)
        )
        turns[question] = answer
    return "\n\n".join(documents), list(turns.items())


def _draw_metadata(rng: random.Random) -> Callable[[str], str]:
    """What stands before every document of one context: mostly nothing, else where it comes from."""
    choice, root = rng.random(), rng.choice(_ROOTS)
    if choice < 0.2:
        return lambda entity: f"file_path: {root}{file_name(entity)}\n\n"
    if choice < 0.25:
        return lambda entity: f"source: {root}{file_name(entity)}\n\n"
    if choice < 0.3:
        return lambda entity: f"title: {entity}\n\n"
    return lambda entity: ""


def draw_sample(
    rng: random.Random,
    num_facts: int,
    wrapper: str | None = None,
    unanswerable: float = 0.15,
    num_questions: int = 6,
    listings: float = 0.0,
    forms_share: float = 0.0,
) -> Sample:
    """A context with its questions in one of the forms that the reader will meet."""
    if wrapper is None and forms_share and rng.random() < forms_share:
        wrapper = rng.choice(FORMS)
    if wrapper == "JSON":
        return Sample(tuple(forms.draw_json(rng, _STUFF_SYSTEM, min(num_facts, 24), min(6, num_questions))))
    if wrapper == "tools":
        return Sample(tuple(forms.draw_tools(rng, min(3, num_questions))))
    context, turns = draw_context(rng, num_facts, unanswerable, num_questions, listings)
    name = wrapper or rng.choices(list(WRAPPERS), _WEIGHTS)[0]
    return Sample(tuple(WRAPPERS[name](rng, context, turns)))
