"""Prompts that put the context before the question, so that a context that comes again is not computed again."""

from __future__ import annotations

from langchain_core.prompts import ChatPromptTemplate

INSTRUCTIONS = "Use the given context to answer the question. If you don't know the answer, say you don't know."


def rag_prompt(instructions: str = INSTRUCTIONS, *, history: bool = False) -> ChatPromptTemplate:
    """A prompt of ``{context}`` and then ``{input}``, for ``create_stuff_documents_chain`` and the like.

    What does not change stands first: instructions, context, then what was said before, and the question last.

    Args:
        history: with a place for earlier messages, ``chat_history``, between the context and the question.
    """
    context = ("system", "{instructions}\n\nContext: {context}")
    earlier = [("placeholder", "{chat_history}")] if history else []
    return ChatPromptTemplate.from_messages([context, *earlier, ("human", "{input}")]).partial(
        instructions=instructions
    )
