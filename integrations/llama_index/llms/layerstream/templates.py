"""Prompts with the context before what changes from question to question."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    RichPromptTemplate,
    SelectorPromptTemplate,
)

from layerstream.api.prompt_layout import CONTEXT_NAMES, QUESTION_NAMES, context_first_template, place_to_swap


def context_first(
    prompt: BasePromptTemplate,
    *,
    question: Collection[str] = QUESTION_NAMES,
    context: Collection[str] = CONTEXT_NAMES,
) -> BasePromptTemplate:
    """*prompt* with the question behind the context, if it has them the other way round.

    Lines are moved, and nothing is rewritten; of a chat, a message with the question goes behind the message with the
    context that follows it. What cannot be decided (both on one line, one of them twice) comes back as it is.

    Args:
        question: names that the question may have among the variables; mapped ones are known.
        context: names of the context.
    """
    mapped = prompt.template_var_mappings or {}
    question = {*question, *(mapped[name] for name in question if name in mapped)}
    context = {*context, *(mapped[name] for name in context if name in mapped)}
    if isinstance(prompt, SelectorPromptTemplate):
        conditionals = [
            (holds, context_first(one, question=question, context=context)) for holds, one in prompt.conditionals or ()
        ]
        return SelectorPromptTemplate(
            context_first(prompt.default_template, question=question, context=context), conditionals
        )
    made: Any = prompt.partial_format()  # a copy
    if isinstance(prompt, PromptTemplate):
        made.template = context_first_template(prompt.template, question, context)
    elif isinstance(prompt, RichPromptTemplate):
        made.template_str = context_first_template(prompt.template_str, question, context)
    elif isinstance(prompt, ChatPromptTemplate):
        made.message_templates = _moved_messages(made.message_templates, question, context)
    return made


def _moved_messages(messages: list[Any], question: Collection[str], context: Collection[str]) -> list[Any]:
    moved = list(messages)
    for at, message in enumerate(moved):
        if len(message.blocks) == 1 and isinstance(message.content, str):
            text = context_first_template(message.content, question, context)
            block = message.blocks[0].model_copy(update={"text": text})
            moved[at] = message.model_copy(update={"blocks": [block]})
    at = place_to_swap([message.content or "" for message in moved], question, context)
    if at is not None:
        moved[at], moved[at + 1] = moved[at + 1], moved[at]
    return moved
