"""LangChain's messages to those of chat templates, and replies to LangChain's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from layerstream.chat.reader import CallPart, Piece, Reply, Text, Thought


def as_chat(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """What the engine's chats are made of.

    Raises:
        ValueError: a message of a kind that has no role.
    """
    return [_as_message(message) for message in messages]


def as_message(reply: Reply) -> AIMessage:
    """A reply as a message: its text, its thoughts where LangChain looks for them, its tool calls."""
    calls, invalid = [], []
    for call in reply.calls:
        if call.arguments is None:
            error = "the arguments are not complete: allow more tokens (max_tokens)"
            invalid.append(invalid_tool_call(name=call.name, args=call.text, id=call.id, error=error))
        else:
            calls.append(tool_call(name=call.name, args=call.arguments, id=call.id))
    more = {"reasoning_content": reply.thought} if reply.thought else {}
    return AIMessage(content=reply.text, tool_calls=calls, invalid_tool_calls=invalid, additional_kwargs=more)


def as_chunk(pieces: Sequence[Piece]) -> AIMessageChunk:
    """Pieces of a reply as a chunk of a message."""
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    return AIMessageChunk(
        content="".join(piece.text for piece in pieces if isinstance(piece, Text)),
        additional_kwargs={"reasoning_content": thought} if thought else {},
        tool_call_chunks=[
            tool_call_chunk(name=piece.name, args=piece.arguments, id=piece.id, index=piece.index)
            for piece in pieces
            if isinstance(piece, CallPart)
        ],
    )


def _as_message(message: BaseMessage) -> dict[str, Any]:
    name = {"name": message.name} if message.name else {}
    match message:
        case SystemMessage():
            return {"role": "system", "content": message.content}
        case HumanMessage():
            return {"role": "user", "content": message.content, **name}
        case AIMessage():
            calls = [
                {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
                for call in message.tool_calls
            ]
            return {"role": "assistant", "content": message.content, **({"tool_calls": calls} if calls else {})}
        case ToolMessage():
            return {"role": "tool", "content": message.content, "tool_call_id": message.tool_call_id, **name}
        case FunctionMessage():
            return {"role": "tool", "content": message.content, **name}
        case ChatMessage():
            return {"role": message.role, "content": message.content, **name}
        case _:
            raise ValueError(f"a message of type {message.type!r} has no place in a chat; found {message!r:.80}")
