"""``LayerStreamLLM``: text in, text out. Translation only; the engine does the work."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams, LanguageModelInput
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.utils.function_calling import convert_to_json_schema
from layerstream.api.apart import apart
from layerstream.api.completion import Completion, Delta, why_cut_off
from layerstream.api.prompt_layout import arranged
from layerstream.chat.tools import closed

from langchain_layerstream._errors import OutputCutOff, overflow_as_langchains
from langchain_layerstream._fields import EngineFields, check_stream, logprobs_of, usage_of
from langchain_layerstream.gangs import join_gang, run_abatch, run_batch
from langchain_layerstream.structured import AnswerParser, target_of

if TYPE_CHECKING:
    from layerstream.api.params import SamplingParams
    from layerstream.api.request import Request
    from layerstream.engine import LayerStream
    from layerstream.text.prompt import Prompt

_WHOLE = "whole_answer"
_CALL_OPTIONS = frozenset({_WHOLE})


class LayerStreamLLM(EngineFields, BaseLLM):
    """A model whose weights stream past the compute, as a LangChain LLM.

    Without arguments it runs the model that ``LAYERSTREAM_MODEL`` names, else the bundled reader. The model is loaded
    at first use; wrappers with the same model and ``engine_kwargs`` share one engine, which closes when the last of
    them is gone.

    Example:
        >>> from langchain_layerstream import LayerStreamLLM
        >>> llm = LayerStreamLLM(model="demo", max_tokens=16)
        >>> prompt = "Context:\\nBrenvik is led by Sluba Merkast.\\n\\nQuestion: Who leads Brenvik?\\nAnswer:"
        >>> llm.invoke(prompt).strip()
        'Sluba Merkast'
    """

    chat_template: Literal["auto"] | bool = "auto"
    """Put a prompt as a user message through the model's chat template: where it has one, always, or never."""

    @property
    def _llm_type(self) -> str:
        return "layerstream"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "chat_template": self.chat_template}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing("llm", stop, kwargs)

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Answer *input*; ``timeout``, ``priority``, ``client`` and ``tenant`` may stand in *config*'s
        ``configurable``. ``passages=`` says which texts in *input* other prompts have as well; ``None``: this one is
        computed exactly."""
        return super().invoke(input, config, stop=stop, **{**self._configured(config), **kwargs})

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """As :meth:`invoke`, without blocking the event loop."""
        return await super().ainvoke(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """As :meth:`invoke`, piece by piece."""
        return super().stream(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        """As :meth:`stream`, without blocking the event loop."""
        return super().astream(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """All *inputs* in the same sweeps; with *return_exceptions* each fails alone."""
        if not return_exceptions and not self._has_terms(config):
            return super().batch(inputs, config, return_exceptions=False, **kwargs)
        return run_batch(self.invoke, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """As :meth:`batch`, on the event loop."""
        if not return_exceptions and not self._has_terms(config):
            return await super().abatch(inputs, config, return_exceptions=False, **kwargs)
        return await run_abatch(self.ainvoke, inputs, config, return_exceptions=return_exceptions, **kwargs)

    def with_structured_output(self, schema: dict[str, Any] | type, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Answers that follow *schema*: instances of a pydantic class, else dicts.

        The grammar sees to it; the prompt should say what is wanted. An answer that was cut off is an error
        (``layerstream.AnswerCutOff``, LangChain's ``OutputParserException``).
        """
        if kwargs:
            raise ValueError(f"with_structured_output of a text model takes a schema alone, not {sorted(kwargs)}")
        wanted = {"type": "json_schema", "schema": closed(convert_to_json_schema(schema))}
        return self.bind(response_format=wanted, **{_WHOLE: True}) | AnswerParser(target=target_of(schema))

    def prompt_for(self, text: str) -> Prompt:
        """What the engine is given for *text*: a user message for the chat template, or the text as it is."""
        text = arranged(text, self.prompt_layout)
        use = self.load().has_chat_template if self.chat_template == "auto" else self.chat_template
        return [{"role": "user", "content": text}] if use else text

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        engine = self.load()
        requests = self._submit(engine, prompts, self._params(stop, kwargs), kwargs)
        try:
            return self._result([request.completions() for request in requests], engine, kwargs)
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
        engine = await self._handle.get_async()
        requests = await apart(
            lambda: self._submit(engine, prompts, self._params(stop, kwargs), kwargs),
            lambda requests: [request.cancel() for request in requests],
        )
        try:
            for request in requests:
                await request
            return self._result([request.completions() for request in requests], engine, kwargs)
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
        engine = self.load()
        params = self._params(stop, kwargs)
        check_stream(params)
        (request,) = self._submit(engine, [prompt], params, kwargs)
        try:
            for delta in request:
                chunk = self._chunk(delta, engine, kwargs)
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
        engine = await self._handle.get_async()
        params = self._params(stop, kwargs)
        check_stream(params)
        request = await apart(
            lambda: self._submit(engine, [prompt], params, kwargs)[0], lambda request: request.cancel()
        )
        try:
            async for delta in request:
                chunk = self._chunk(delta, engine, kwargs)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            request.cancel()

    def _has_terms(self, config: RunnableConfig | list[RunnableConfig] | None) -> bool:
        """Whether each input has terms of its own, so that LangChain's one call for all of them will not do."""
        return any(self._configured(one) for one in (config if isinstance(config, list) else [config]))

    def _params(self, stop: list[str] | None, kwargs: dict[str, Any]) -> SamplingParams:
        self._check_call(kwargs, _CALL_OPTIONS)
        return self._sampling(stop, kwargs)

    def _submit(
        self, engine: LayerStream, prompts: Sequence[str], params: SamplingParams, kwargs: dict[str, Any]
    ) -> list[Request]:
        join_gang(engine)
        with overflow_as_langchains():
            return engine.submit_many([self.prompt_for(prompt) for prompt in prompts], params, **self._terms(kwargs))

    def _result(self, completions: list[list[Completion]], engine: LayerStream, kwargs: dict[str, Any]) -> LLMResult:
        generations = [
            [Generation(text=c.text, generation_info=_info(c, engine, kwargs)) for c in group] for group in completions
        ]
        usage = {
            "prompt_tokens": sum(group[0].usage.prompt_tokens for group in completions),
            "completion_tokens": sum(c.usage.completion_tokens for group in completions for c in group),
        }
        usage["total_tokens"] = sum(usage.values())
        return LLMResult(generations=generations, llm_output={"token_usage": usage, "model_name": self.model})

    def _chunk(self, delta: Delta, engine: LayerStream, kwargs: dict[str, Any]) -> GenerationChunk:
        done = delta.completion
        info = None if done is None else {**_info(done, engine, kwargs), "model_name": self.model}
        return GenerationChunk(text=delta.text, generation_info=info)


def _info(completion: Completion, engine: LayerStream, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What LangChain is told beside the text.

    Raises:
        OutputCutOff: the call wants a whole answer, and this is none: a text alone would not show it.
    """
    reason = completion.finish_reason
    if kwargs.get(_WHOLE) and reason != "stop":
        raise OutputCutOff(f"the answer {why_cut_off(reason)}; found {completion.text!r:.200}")
    return {
        "finish_reason": completion.finish_reason,
        "usage": usage_of(completion),
        "logprobs": logprobs_of(completion, engine),
        "metrics": dataclasses.asdict(completion.metrics),
    }
