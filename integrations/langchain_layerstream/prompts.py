"""Prompts that put the context before the question, so that a context that comes again is not computed again."""

from __future__ import annotations

from langchain_core.prompts import ChatPromptTemplate

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
