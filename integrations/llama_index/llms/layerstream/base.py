"""``LayerStreamLLM`` for LlamaIndex. Translation only; the engine does the work."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

from layerstream.completion import Completion, Delta
from layerstream.handle import EngineHandle, default_model
from layerstream.params import SamplingParams

if TYPE_CHECKING:
    from layerstream.engine import LayerStream
    from layerstream.request import Request

logger = logging.getLogger(__name__)

_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


class LayerStreamLLM(LLM):
    """A model whose weights stream past the compute, as a LlamaIndex LLM.

    Without arguments it runs the model that ``LAYERSTREAM_MODEL`` names, else the bundled reader. The model is loaded
    at first use; wrappers with the same model and ``engine_kwargs`` share one engine.
    """

    model: str = Field(default_factory=default_model, description="Folder, hub id, or 'demo'.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the engine, such as memory.")
    max_new_tokens: int | None = Field(default=256, description="Tokens of an answer at most.")
    temperature: float | None = Field(default=None, description="0 is greedy; None is the model's own default.")
    top_p: float | None = Field(default=None, description="Share of probability that tokens are drawn from.")
    top_k: int | None = Field(default=None, description="Number of tokens that are drawn from.")
    seed: int | None = Field(default=None, description="Same seed, same prompt, same text.")
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer.")
    context_window: int | None = Field(default=None, description="Tokens of context; None is the model's own.")

    _handle: EngineHandle = PrivateAttr()

    def __init__(self, model: str | None = None, *, engine: LayerStream | None = None, **fields: Any) -> None:
        handle = EngineHandle(model, fields.get("engine_kwargs"), engine)
        super().__init__(model=handle.model, **fields)  # type: ignore[call-arg]  # fields become parameters in pydantic
        self._handle = handle

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "LayerStreamLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by; loads the model's files if they are not yet."""
        engine = self._handle.get()
        return LLMMetadata(
            context_window=self.context_window or engine.context_length,
            num_output=self.max_new_tokens or 256,
            is_chat_model=engine.has_chat_template,
            model_name=self.model,
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; the chat template is put around it unless it is *formatted* already."""
        return _completed(self._wait(self._prompt(self._handle.get(), prompt, formatted), kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """As :meth:`complete`, piece by piece."""
        return self._stream_text(self._prompt(self._handle.get(), prompt, formatted), kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As :meth:`complete`, without blocking the event loop."""
        engine = await self._engine()
        return _completed(await self._submit(engine, self._prompt(engine, prompt, formatted), kwargs))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As :meth:`stream_complete`, without blocking the event loop."""
        engine = await self._engine()
        return self._astream_text(engine, self._prompt(engine, prompt, formatted), kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer *messages*."""
        return _chatted(self._wait(_as_prompt(self._handle.get(), messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As :meth:`chat`, piece by piece."""
        pieces = self._stream_text(_as_prompt(self._handle.get(), messages), kwargs)
        return (_as_chat(piece) for piece in pieces)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As :meth:`chat`, without blocking the event loop."""
        engine = await self._engine()
        return _chatted(await self._submit(engine, _as_prompt(engine, messages), kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As :meth:`stream_chat`, without blocking the event loop."""
        engine = await self._engine()
        pieces = self._astream_text(engine, _as_prompt(engine, messages), kwargs)

        async def chats() -> ChatResponseAsyncGen:
            async for piece in pieces:
                yield _as_chat(piece)

        return chats()

    async def _engine(self) -> LayerStream:
        """The engine, loaded on a thread so that the event loop goes on."""
        return self._handle.get() if self._handle.is_loaded else await asyncio.to_thread(self._handle.get)

    def _prompt(self, engine: LayerStream, prompt: str, formatted: bool) -> Any:
        if formatted or not engine.has_chat_template:
            return prompt
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": prompt}]

    def _submit(self, engine: LayerStream, prompt: Any, kwargs: dict[str, Any]) -> Request:
        fields: dict[str, Any] = {
            name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")
        }
        fields["max_tokens"] = kwargs.pop("max_new_tokens", self.max_new_tokens)
        fields.update({name: value for name, value in kwargs.items() if name in _SAMPLING_FIELDS})
        try:
            return engine.submit(prompt, SamplingParams(**fields))
        except ValueError as error:  # LlamaIndex's synthesizers turn these into an empty response, without a word
            logger.error("%s", error)
            raise

    def _wait(self, prompt: Any, kwargs: dict[str, Any]) -> Completion:
        request = self._submit(self._handle.get(), prompt, kwargs)
        try:
            return request.result()
        finally:
            request.cancel()

    def _stream_text(self, prompt: Any, kwargs: dict[str, Any]) -> Generator[CompletionResponse, None, None]:
        request = self._submit(self._handle.get(), prompt, kwargs)
        text = ""
        try:
            for delta in request:
                text += delta.text
                yield _piece(text, delta)
        finally:
            request.cancel()

    async def _astream_text(
        self, engine: LayerStream, prompt: Any, kwargs: dict[str, Any]
    ) -> AsyncGenerator[CompletionResponse, None]:
        request = self._submit(engine, prompt, kwargs)
        text = ""
        try:
            async for delta in request:
                text += delta.text
                yield _piece(text, delta)
        finally:
            request.cancel()


def _as_prompt(engine: LayerStream, messages: Sequence[ChatMessage]) -> Any:
    """Messages for the chat template; for a model without one, their text, a line each."""
    if engine.has_chat_template:
        return [{"role": message.role.value, "content": message.content or ""} for message in messages]
    lines = [f"{message.role.value}: {message.content or ''}" for message in messages]
    return "\n".join([*lines, "assistant: "])


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


def _completed(completion: Completion) -> CompletionResponse:
    return CompletionResponse(text=completion.text, raw=_raw(completion))


def _chatted(completion: Completion) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=completion.text)
    return ChatResponse(message=message, raw=_raw(completion))


def _piece(text: str, delta: Delta) -> CompletionResponse:
    raw = None if delta.completion is None else _raw(delta.completion)
    return CompletionResponse(text=text, delta=delta.text, raw=raw)


def _as_chat(piece: CompletionResponse) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=piece.text)
    return ChatResponse(message=message, delta=piece.delta, raw=piece.raw)
