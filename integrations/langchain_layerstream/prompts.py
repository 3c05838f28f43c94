"""Prompts that put the context before the question, so that a context that comes again is not computed again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate
from layerstream.api.prompt_layout import CONTEXT_NAMES, QUESTION_NAMES, context_first_template, place_to_swap

Template = TypeVar("Template", bound=BasePromptTemplate)

INSTRUCTIONS = "Use the given context to answer the question. If you don't know the answer, say you don't know."


CITING = " The context has numbered passages: cite those that you used by their numbers in brackets, such as [1]."


def rag_prompt(
    instructions: str = INSTRUCTIONS, *, history: bool = False, citations: bool = False
) -> ChatPromptTemplate:
    """A prompt of ``{context}`` and then ``{input}``, for ``create_stuff_documents_chain`` and the like.

    What does not change stands first: instructions, context, then what was said before, and the question last.

    Args:
        citations: ask for them; ``cited_documents_chain`` numbers the documents and holds the answer to their numbers.
        history: with a place for earlier messages, ``chat_history``, between the context and the question.
    """
    context = ("system", "{instructions}\n\nContext: {context}")
    earlier = [("placeholder", "{chat_history}")] if history else []
    return ChatPromptTemplate.from_messages([context, *earlier, ("human", "{input}")]).partial(
        instructions=instructions + (CITING if citations else "")
    )


def context_first(
    prompt: Template, *, question: Collection[str] = QUESTION_NAMES, context: Collection[str] = CONTEXT_NAMES
) -> Template:
    """*prompt* with the question behind the context, if it has them the other way round: the hub's ``rlm/rag-prompt``
    and the like share nothing between questions, however long the context is that both have.

    Lines are moved, and nothing is rewritten; of a chat, a message with the question goes behind the message with the
    context that follows it. Of a prompt with examples (``FewShotPromptTemplate``) the suffix is moved, which has the
    real question; examples stay as they are. What cannot be decided (both on one line, one of them twice) comes back as
    it is.

    Args:
        question: names that the question may have among the variables.
        context: names of the context.
    """
    if isinstance(prompt, ChatPromptTemplate):
        messages = [_moved(message, question, context) for message in prompt.messages]
        at = place_to_swap([_text(message) for message in messages], question, context)
        if at is not None:
            messages[at], messages[at + 1] = messages[at + 1], messages[at]
        return prompt.model_copy(update={"messages": messages})
    return _moved(prompt, question, context)


def _text(message: Any) -> str:
    """The template of a message, or of a prompt; empty where it has not one alone."""
    template = getattr(getattr(message, "prompt", message), "template", "")
    return template if isinstance(template, str) else ""


def _moved(message: Any, question: Collection[str], context: Collection[str]) -> Any:
    """A message, a prompt, or the text of a template."""
    if isinstance(message, str):
        return context_first_template(message, question, context)
    for name in ("prompt", "suffix", "template"):  # of a message; behind examples; of a prompt
        inner = getattr(message, name, None)
        if isinstance(inner, str | BasePromptTemplate):
            moved = _moved(inner, question, context)
            return message if moved == inner else message.model_copy(update={name: moved})
    return message
