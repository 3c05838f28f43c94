"""From the engine's answers to LlamaIndex's responses, whole or growing."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
from llama_index.llms.layerstream.messages import as_blocks

from layerstream.chat.reader import Piece, ReplyReader, gather, join_pieces
from layerstream.completion import Completion, Delta

if TYPE_CHECKING:
    from layerstream.request import Request

Reader = ReplyReader | None
"""What reads an answer to a chat; ``None``: it is text."""


def wait(request: Request) -> Completion:
    """The answer; leaving gives the request up."""
    try:
        return request.result()
    finally:
        request.cancel()


async def wait_async(request: Request) -> Completion:
    """The answer; a task that is cancelled gives the request up."""
    try:
        return await request
    finally:
        request.cancel()


def stream_text(request: Request, reader: Reader) -> Generator[CompletionResponse, None, None]:
    """The text as it grows."""
    for response in stream_chat(request, reader):
        yield _as_text(response)


async def astream_text(request: Request, reader: Reader) -> AsyncGenerator[CompletionResponse, None]:
    """As :func:`stream_text`."""
    async for response in astream_chat(request, reader):
        yield _as_text(response)


def stream_chat(request: Request, reader: Reader) -> Generator[ChatResponse, None, None]:
    """The message as it grows."""
    growing = _Growing(reader)
    try:
        for delta in request:
            yield growing.add(delta)
    finally:
        request.cancel()


async def astream_chat(request: Request, reader: Reader) -> AsyncGenerator[ChatResponse, None]:
    """As :func:`stream_chat`."""
    growing = _Growing(reader)
    try:
        async for delta in request:
            yield growing.add(delta)
    finally:
        request.cancel()


class _Growing:
    """An answer as far as it has come: LlamaIndex's streams repeat the whole with every piece."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._pieces: list[Piece] = []
        self._text = ""

    def add(self, delta: Delta) -> ChatResponse:
        """The answer with *delta*."""
        raw = None if delta.completion is None else _raw(delta.completion)
        if self._reader is None:
            self._text += delta.text
            message = ChatMessage(role=MessageRole.ASSISTANT, content=self._text)
            return ChatResponse(message=message, delta=delta.text, raw=raw)
        fresh = self._reader.push(delta.text)
        if delta.completion is not None:
            fresh += self._reader.finish()
        self._pieces = join_pieces([*self._pieces, *fresh])
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=as_blocks(gather(self._pieces)))
        return ChatResponse(message=message, delta=gather(fresh).text, raw=raw)


def completed(completion: Completion, reader: Reader) -> CompletionResponse:
    """A whole text, as its stream adds up to."""
    return _as_text(chatted(completion, reader))


def chatted(completion: Completion, reader: Reader) -> ChatResponse:
    """A whole message, read."""
    if reader is None:
        message = ChatMessage(role=MessageRole.ASSISTANT, content=completion.text)
    else:
        reply = gather([*reader.push(completion.text), *reader.finish()])
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=as_blocks(reply))
    return ChatResponse(message=message, raw=_raw(completion))


def _as_text(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(text=response.message.content or "", delta=response.delta, raw=response.raw)


def _raw(completion: Completion) -> dict[str, Any]:
    """Usage where LlamaIndex's token counter looks for it."""
    usage = completion.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "finish_reason": completion.finish_reason,
        "metrics": dataclasses.asdict(completion.metrics),
    }
