"""Reducers for LangGraph: in a conversation passages come in behind those that are there, and none comes twice.

A prompt of a later turn then begins as the one before, as far as what stands in front: its KV is found. Retrieving
anew for every turn and replacing the context would have it computed again from the first passage that differs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from layerstream.api.conversations import NOTHING_NEW, leave_out
from layerstream.api.prefix_order import append_new


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
    passages that another result has. All else is as ``add_messages`` makes it: ids, what takes another's place, what is
    removed, and every message in which no passage is repeated.

    Args:
        document_separator: what the tool writes between two passages.
    """
    from langgraph.graph.message import add_messages

    messages: list[Any] = add_messages(left, right)  # type: ignore[assignment]
    stood = {id(message) for message in (left if isinstance(left, list) else [left])}
    known = {passage for message in messages if id(message) in stood for passage in _shown(message)}
    for number, message in enumerate(messages):
        if id(message) not in stood:
            messages[number] = message = _with_new_alone(message, known, document_separator)
            known.update(_shown(message))
    return messages


def _with_new_alone(message: Any, known: Collection[str], separator: str) -> Any:
    """*message* without the passages that are *known*; itself, if it has none of them."""
    items = _artifact(message)
    numbers = [number for number, item in enumerate(items) if _passage(item)]
    texts = _texts(message)
    rest, left_out = leave_out(list(texts.values()), [_passage(items[number]) for number in numbers], known, separator)
    if not left_out:
        return message
    gone = {numbers[number] for number in left_out}
    return message.model_copy(
        update={
            "content": _with_texts(message.content, dict(zip(texts, rest, strict=True))),
            "artifact": [item for number, item in enumerate(items) if number not in gone],
        }
    )


def _shown(message: Any) -> set[str]:
    """The passages that stand in *message*: one whose text was taken out of it since is none of them."""
    said = list(_texts(message).values()) if _artifact(message) else []
    return {text for text in map(_passage, _artifact(message)) if text and any(text in part for part in said)}


def _artifact(message: Any) -> list[Any]:
    """What a retriever's result brought beside its text."""
    return message.artifact if isinstance(message, ToolMessage) and isinstance(message.artifact, list) else []


def _passage(item: Any) -> str:
    """The text of a document (a checkpointer gives documents back as dicts), else nothing."""
    if isinstance(item, dict) and item.get("type") == "Document":
        found = item.get("page_content")
        return found if isinstance(found, str) else ""
    return item.page_content if isinstance(item, Document) else ""


def _texts(message: Any) -> dict[int, str]:
    """What *message* says, by the number of the block."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = (block.get("text") if isinstance(block, dict) else block for block in blocks)
    return {number: text for number, text in enumerate(texts) if isinstance(text, str)}


def _with_texts(content: Any, texts: Mapping[int, str]) -> Any:
    """*content* with these *texts* in its blocks; of a block whose text is gone nothing is left."""
    if isinstance(content, str):
        return texts[0] or NOTHING_NEW
    blocks = []
    for number, block in enumerate(content):
        text = block.get("text") if isinstance(block, dict) else block
        if number not in texts or texts[number] == text:
            blocks.append(block)
        elif texts[number]:
            blocks.append({**block, "text": texts[number]} if isinstance(block, dict) else texts[number])
    return blocks or [{"type": "text", "text": NOTHING_NEW}]
