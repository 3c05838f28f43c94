"""Reducers for LangGraph: in a conversation passages come in behind those that are there, and none comes twice.

A prompt of a later turn then begins as the one before, as far as what stands in front: its KV is found. Retrieving
anew for every turn and replacing the context would have it computed again from the first passage that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, ToolMessage, convert_to_messages
from layerstream.api.prefix_order import append_new

from langchain_layerstream.documents import canonical

NOTHING_NEW = "Nothing that is not above already."
"""What a tool's result says whose passages have all been in the conversation."""


def grow_context(old: Sequence[Document], new: Sequence[Document], *, most: int | None = None) -> list[Document]:
    """A reducer for a chat's documents: ``context: Annotated[list[Document], grow_context]``.

    Those of *new* that are not among *old* come behind them.

    Args:
        most: so many stand together at most (``functools.partial(grow_context, most=12)``). Past it the context begins
            again with *new*.
    """
    return append_new(old, new, lambda document: document.page_content, most)


def add_new_passages(left: Any, right: Any, *, document_separator: str = "\n\n") -> Any:
    """A reducer for an agent's messages, as ``add_messages``: ``messages: Annotated[list, add_new_passages]``.

    The result of a retriever's tool (``create_retriever_tool(..., response_format="content_and_artifact")``) loses the
    passages that an earlier result has. Those that are left stand by where they come from, whatever their rank.
    """
    from langgraph.graph.message import add_messages

    arriving = convert_to_messages(right if isinstance(right, list) else [right])
    earlier = [message for message in left if not _is_among(message, arriving)]
    known = {document.page_content for message in earlier for document in _passages(message)}
    for number, message in enumerate(arriving):
        if found := _passages(message):
            rest = sorted((document for document in found if document.page_content not in known), key=canonical)
            known.update(document.page_content for document in found)
            text = document_separator.join(document.page_content for document in rest) or NOTHING_NEW
            arriving[number] = message.model_copy(update={"content": text, "artifact": rest})
    return add_messages(left, arriving)  # type: ignore[arg-type]


def _passages(message: BaseMessage) -> list[Document]:
    """What a retriever's result brought; a checkpointer gives documents back as dicts."""
    found = message.artifact if isinstance(message, ToolMessage) and isinstance(message.artifact, list) else []
    documents = [item for item in found if isinstance(item, Document)]
    return documents or [
        Document(**item) for item in found if isinstance(item, dict) and item.get("type") == "Document"
    ]


def _is_among(message: BaseMessage, others: Sequence[BaseMessage]) -> bool:
    """Whether one of *others* takes the place of *message*."""
    return message.id is not None and any(other.id == message.id for other in others)
