"""``LayerStreamLLM``: text in, text out. Translation only; the engine does the work."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from layerstream.completion import Completion, Delta
from layerstream.handle import EngineHandle, default_model
from layerstream.params import SamplingParams
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

if TYPE_CHECKING:
    from layerstream.engine import LayerStream
    from layerstream.request import Request

_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


class LayerStreamLLM(BaseLLM):
    """A model whose weights stream past the compute, as a LangChain LLM.

    Without arguments it runs the model that ``LAYERSTREAM_MODEL`` names, else the bundled reader. The model is loaded
    at first use; wrappers with the same model and ``engine_kwargs`` share one engine.

    Example:
        .. code-block:: python

            from langchain_layerstream import LayerStreamLLM

            llm = LayerStreamLLM(model="path/to/model", engine_kwargs={"memory": "3GiB"}, max_tokens=64)
            llm.invoke("Who leads Brenvik?")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(default_factory=default_model)
    """Folder, hub id, or ``"demo"``."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """A :class:`layerstream.LayerStream` to share; ``model`` then follows from it."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine, such as ``memory``."""
    chat_template: Literal["auto"] | bool = "auto"
    """Put a prompt as a user message through the model's chat template: where it has one, always, or never."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None

    _handle: EngineHandle = PrivateAttr()

    @model_validator(mode="after")
    def _bind_layerstream_engine(self) -> Self:
        """Bind the engine, which loads at first use."""
        chosen = self.model if "model" in self.model_fields_set else None
        self._handle = EngineHandle(chosen, self.engine_kwargs, self.engine)
        self.model = self._handle.model
        return self

    @property
    def _llm_type(self) -> str:
        return "layerstream"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything an answer depends on: LangChain's caches use it as their key."""
        names = (
            "model",
            "engine_kwargs",
            "chat_template",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "max_tokens",
            "stop",
        )
        return {name: getattr(self, name) for name in names}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = self._sampling(stop, kwargs)
        tracing = LangSmithParams(
            ls_provider="layerstream", ls_model_name=kwargs.get("model", self.model), ls_model_type="llm"
        )
        if params.temperature is not None:
            tracing["ls_temperature"] = params.temperature
        if params.max_tokens is not None:
            tracing["ls_max_tokens"] = params.max_tokens
        if params.stop:
            tracing["ls_stop"] = list(params.stop)
        return tracing

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of *text*."""
        return self._handle.get().tokenizer(text, add_special_tokens=False)["input_ids"]

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests = self._submit(prompts, stop, kwargs)
        try:
            return self._result([request.completions() for request in requests])
        finally:
            for request in requests:
                request.cancel()

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        engine = await self._engine()
        requests = self._submit(prompts, stop, kwargs, engine)
        try:
            for request in requests:
                await request
            return self._result([request.completions() for request in requests])
        finally:
            for request in requests:
                request.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        (request,) = self._submit([prompt], stop, kwargs)
        try:
            for delta in request:
                chunk = _chunk(delta, self.model)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            request.cancel()

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        engine = await self._engine()
        (request,) = self._submit([prompt], stop, kwargs, engine)
        try:
            async for delta in request:
                chunk = _chunk(delta, self.model)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            request.cancel()

    async def _engine(self) -> LayerStream:
        """The engine, loaded on a thread so that the event loop goes on."""
        if self._handle.is_loaded:
            return self._handle.get()
        from asyncio import to_thread

        return await to_thread(self._handle.get)

    def _submit(
        self, prompts: Sequence[str], stop: list[str] | None, kwargs: dict[str, Any], engine: LayerStream | None = None
    ) -> list[Request]:
        engine = engine or self._handle.get()
        return engine.submit_many([self._templated(engine, prompt) for prompt in prompts], self._sampling(stop, kwargs))

    def _templated(self, engine: LayerStream, prompt: str) -> Any:
        use = engine.has_chat_template if self.chat_template == "auto" else self.chat_template
        return [{"role": "user", "content": prompt}] if use else prompt

    def _sampling(self, stop: list[str] | None, kwargs: dict[str, Any]) -> SamplingParams:
        """The instance's fields, overridden by the call's; stop strings of both."""
        fields = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")}
        fields.update({name: value for name, value in kwargs.items() if name in _SAMPLING_FIELDS})
        fields["stop"] = list(dict.fromkeys([*(self.stop or []), *(stop or [])]))
        return SamplingParams(**fields)

    def _result(self, completions: list[list[Completion]]) -> LLMResult:
        generations = [[Generation(text=c.text, generation_info=_info(c)) for c in group] for group in completions]
        every = [completion for group in completions for completion in group]
        usage = {
            "prompt_tokens": sum(group[0].usage.prompt_tokens for group in completions),
            "completion_tokens": sum(completion.usage.completion_tokens for completion in every),
        }
        usage["total_tokens"] = sum(usage.values())
        return LLMResult(generations=generations, llm_output={"token_usage": usage, "model_name": self.model})


def _info(completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    return {
        "finish_reason": completion.finish_reason,
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "input_token_details": {"cache_read": usage.cached_tokens},
        },
        "metrics": dataclasses.asdict(completion.metrics),
    }


def _chunk(delta: Delta, model: str) -> GenerationChunk:
    info = None if delta.completion is None else {**_info(delta.completion), "model_name": model}
    return GenerationChunk(text=delta.text, generation_info=info)
