"""From the engine's answers to LlamaIndex's responses, whole or growing."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LogProb, MessageRole
from llama_index.llms.layerstream.messages import as_blocks

from layerstream.api.completion import Completion, Delta, openai_logprobs
from layerstream.chat.reader import Piece, ReplyReader, gather, join_pieces

if TYPE_CHECKING:
    from layerstream.api.request import Request

Reader = ReplyReader | None
"""What reads an answer to a chat; ``None``: it is text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what its answer is read with; ``decode`` makes text of token ids."""

    request: Request
    reader: Reader
    decode: Callable[[list[int]], str]


def complete(asked: Asked) -> CompletionResponse:
    """A whole text, as its stream adds up to."""
    return _as_text(chat(asked))


async def acomplete(asked: Asked) -> CompletionResponse:
    """As :func:`complete`."""
    return _as_text(await achat(asked))


def chat(asked: Asked) -> ChatResponse:
    """A whole message; leaving gives the request up."""
    try:
        return _read(asked, asked.request.result())
    finally:
        asked.request.cancel()


async def achat(asked: Asked) -> ChatResponse:
    """As :func:`chat`; a task that is cancelled gives the request up."""
    try:
        return _read(asked, await asked.request)
    finally:
        asked.request.cancel()


def stream_text(asked: Asked) -> Generator[CompletionResponse, None, None]:
    """The text as it grows."""
    for response in stream_chat(asked):
        yield _as_text(response)


async def astream_text(asked: Asked) -> AsyncGenerator[CompletionResponse, None]:
    """As :func:`stream_text`."""
    async for response in astream_chat(asked):
        yield _as_text(response)


def stream_chat(asked: Asked) -> Generator[ChatResponse, None, None]:
    """The message as it grows."""
    growing = _Growing(asked)
    try:
        for delta in asked.request:
            yield growing.add(delta)
    finally:
        asked.request.cancel()


async def astream_chat(asked: Asked) -> AsyncGenerator[ChatResponse, None]:
    """As :func:`stream_chat`."""
    growing = _Growing(asked)
    try:
        async for delta in asked.request:
            yield growing.add(delta)
    finally:
        asked.request.cancel()


class _Growing:
    """An answer as far as it has come: LlamaIndex's streams repeat the whole with every piece."""

    def __init__(self, asked: Asked) -> None:
        self._reader, self._decode = asked.reader, asked.decode
        self._pieces: list[Piece] = []
        self._text = ""

    def add(self, delta: Delta) -> ChatResponse:
        """The answer with *delta*."""
        told = {} if delta.completion is None else _told(delta.completion, self._decode)
        if self._reader is None:
            self._text += delta.text
            message = ChatMessage(role=MessageRole.ASSISTANT, content=self._text)
            return ChatResponse(message=message, delta=delta.text, **told)
        fresh = self._reader.push(delta.text)
        if delta.completion is not None:
            fresh += self._reader.finish()
        self._pieces = join_pieces([*self._pieces, *fresh])
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=as_blocks(gather(self._pieces)))
        return ChatResponse(message=message, delta=gather(fresh).text, **told)


def _read(asked: Asked, completion: Completion) -> ChatResponse:
    """A whole message, read."""
    reader = asked.reader
    if reader is None:
        message = ChatMessage(role=MessageRole.ASSISTANT, content=completion.text)
    else:
        reply = gather([*reader.push(completion.text), *reader.finish()])
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=as_blocks(reply))
    return ChatResponse(message=message, **_told(completion, asked.decode))


def _as_text(response: ChatResponse) -> CompletionResponse:
    return CompletionResponse(
        text=response.message.content or "", delta=response.delta, raw=response.raw, logprobs=response.logprobs
    )


def _told(completion: Completion, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """What a response says beside the message: ``raw``, and ``logprobs`` if they were asked for."""
    raw = _raw(completion)
    logprobs = openai_logprobs(completion, decode)
    if logprobs is None:
        return {"raw": raw}
    # for each token the most probable ones, as LlamaIndex's OpenAI has it; the token alone where none were asked for
    best = [[_logprob(entry) for entry in token["top_logprobs"] or [token]] for token in logprobs["content"]]
    return {"raw": {**raw, "logprobs": logprobs}, "logprobs": best}


def _logprob(entry: dict[str, Any]) -> LogProb:
    return LogProb(token=entry["token"], logprob=entry["logprob"], bytes=entry["bytes"])


def _raw(completion: Completion) -> dict[str, Any]:
    """Usage where LlamaIndex's token counter looks for it."""
    usage = completion.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "cached_tokens": usage.cached_tokens,
            "blended_tokens": usage.blended_tokens,
        },
        "finish_reason": completion.finish_reason,
        "metrics": dataclasses.asdict(completion.metrics),
    }
