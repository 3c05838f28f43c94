"""LangChain's messages to those of chat templates, and replies to LangChain's messages.

A call that was cut off is an invalid call, whichever way it comes. LangChain completes the JSON of calls when it merges
chunks, and an agent would run a tool with half an argument: so such a call ends in what no parser completes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from layerstream.chat.reader import CallPart, Piece, Reply, ReplyReader, Text, Thought, gather, join_pieces
from layerstream.chat.tools import Tool

_CUT_OFF = " (cut off)"
_CLOSERS = ("]", "}", '"]', '"}', '""]', '""}')


def as_chat(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """What the engine's chats are made of.

    Raises:
        ValueError: a message of a kind that has no role.
    """
    return [plain for message in messages for plain in (*_tool_results(message), *_as_messages(message))]


def as_message(reply: Reply) -> AIMessage:
    """A reply as a message: its text, its thoughts where LangChain looks for them, its tool calls."""
    calls, invalid = [], []
    for call in reply.calls:
        if call.arguments is None:
            error = "the arguments are not complete: allow more tokens (max_tokens)"
            args = call.text + cut_off_mark(call.text)
            invalid.append(invalid_tool_call(name=call.name, args=args, id=call.id, error=error))
        else:
            calls.append(tool_call(name=call.name, args=call.arguments, id=call.id))
    more = {"reasoning_content": reply.thought} if reply.thought else {}
    return AIMessage(content=reply.text, tool_calls=calls, invalid_tool_calls=invalid, additional_kwargs=more)


class ChunkStream:
    """Turns the text of an answer, as it comes, into chunks of a message."""

    def __init__(self, reader: ReplyReader) -> None:
        self._reader = reader
        self._pieces: list[Piece] = []

    @property
    def has_calls(self) -> bool:
        """Whether a call is complete."""
        return any(call.arguments is not None for call in gather(self._pieces).calls)

    def push(self, text: str) -> AIMessageChunk | None:
        """What *text* adds; ``None``: nothing yet."""
        pieces = self._reader.push(text)
        self._pieces += pieces
        return _as_chunk(pieces) if pieces else None

    def finish(self, text: str) -> list[AIMessageChunk]:
        """What *text*, the last of the answer, adds.

        The last chunk has no part of a call: LangChain's content blocks take what a last chunk has for whole calls.
        """
        pieces = [*self._reader.push(text), *self._reader.finish()]
        self._pieces += pieces
        calls = enumerate(gather(self._pieces).calls)
        marks = [CallPart(index, cut_off_mark(call.text)) for index, call in calls if call.arguments is None]
        chunk = _as_chunk(join_pieces([*pieces, *marks]))
        return [chunk, AIMessageChunk(content="")] if chunk.tool_call_chunks else [chunk]


def cut_off_mark(arguments: str) -> str:
    """An ending with which *arguments*, JSON that is not complete, stay so for LangChain's parser.

    It closes whatever is open and takes away what is half; only a bracket that closes something else stops it.
    """
    return next(c + _CUT_OFF for c in _CLOSERS if not isinstance(parse_partial_json(arguments + c), dict))


def as_tool(tool: dict[str, Any] | type | Callable[..., Any] | BaseTool) -> dict[str, Any]:
    """A tool in OpenAI's form.

    Raises:
        ToolError: a provider's built-in tool, which nobody runs here.
    """
    kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
    if isinstance(tool, dict) and kind not in ("function", "object") and "input_schema" not in tool:
        Tool.of(tool)  # LangChain would make a function of some of them
    return convert_to_openai_tool(tool)


def _as_chunk(pieces: Sequence[Piece]) -> AIMessageChunk:
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


def _as_messages(message: BaseMessage) -> list[dict[str, Any]]:
    """*message*; nothing where all that it brings are results of tools."""
    if isinstance(message.content, list) and message.content and not _without(message.content, "tool_result"):
        return []
    return [_as_message(message)]


def _tool_results(message: BaseMessage) -> list[dict[str, Any]]:
    """What a message brings of tools in Anthropic's form."""
    return [
        {"role": "tool", "content": part.get("content"), "tool_call_id": part.get("tool_use_id")}
        for part in _parts(message, "tool_result")
    ]


def _as_message(message: BaseMessage) -> dict[str, Any]:
    name = {"name": message.name} if message.name else {}
    match message:
        case SystemMessage():
            return {"role": "system", "content": message.content}
        case HumanMessage():
            return {"role": "user", "content": _without(message.content, "tool_result"), **name}
        case AIMessage():
            calls = [_as_call(call) for call in (*message.tool_calls, *message.invalid_tool_calls)]
            calls = calls or [_as_call({**part, "args": part.get("input")}) for part in _parts(message, "tool_use")]
            return {"role": "assistant", "content": message.content, **({"tool_calls": calls} if calls else {})}
        case ToolMessage():
            return {"role": "tool", "content": message.content, "tool_call_id": message.tool_call_id, **name}
        case FunctionMessage():
            return {"role": "tool", "content": message.content, **name}
        case ChatMessage():
            return {"role": message.role, "content": message.content, **name}
        case _:
            raise ValueError(f"a message of type {message.type!r} has no place in a chat; found {message!r:.80}")


def _parts(message: BaseMessage, kind: str) -> list[dict[str, Any]]:
    """The parts of a message's content that are of *kind*."""
    content = message.content if isinstance(message.content, list) else []
    return [part for part in content if isinstance(part, dict) and part.get("type") == kind]


def _without(content: Any, kind: str) -> Any:
    """*content* without its parts of *kind*."""
    if not isinstance(content, list):
        return content
    return [part for part in content if not (isinstance(part, dict) and part.get("type") == kind)]


def _as_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call that was made, or tried: the tool's answer behind it says what became of it."""
    function = {"name": call.get("name") or "?", "arguments": call.get("args")}
    return {"id": call.get("id"), "type": "function", "function": function}
