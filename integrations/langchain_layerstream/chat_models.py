"""``ChatLayerStream``: messages in, a message out. Translation only; the engine does the work."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from layerstream.api.apart import apart
from layerstream.api.completion import Completion, Delta
from layerstream.api.prompt_layout import arranged_messages
from layerstream.errors import ConfigurationError, PromptTooLong
from layerstream.handle import peek_context_length
from pydantic import Field

from langchain_layerstream._errors import overflow_as_langchains
from langchain_layerstream._fields import EngineFields, add_usages, check_stream, logprobs_of, usage_of
from langchain_layerstream.gangs import join_gang, run_abatch, run_batch
from langchain_layerstream.messages import ChunkStream, as_chat, as_message, as_tool
from langchain_layerstream.structured import AnswerParser, target_of, with_raw

if TYPE_CHECKING:
    from layerstream.api.request import Request
    from layerstream.chat.turn import Turn
    from layerstream.engine import LayerStream

Method = Literal["json_schema", "function_calling", "json_mode"]
_CALL_OPTIONS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "explain_schema"})


class ChatLayerStream(EngineFields, BaseChatModel):
    """A model whose weights stream past the compute, as a LangChain chat model.

    Without arguments it runs the model that ``LAYERSTREAM_MODEL`` names, else the bundled reader. The model is loaded
    at first use; wrappers with the same model and ``engine_kwargs`` share one engine, which closes when the last of
    them is gone. Every model can be given tools and schemas: a grammar sees to it that calls and JSON are well-formed.

    Example:
        >>> from langchain_layerstream import ChatLayerStream
        >>> llm = ChatLayerStream(model="demo", max_tokens=16)
        >>> message = llm.invoke("Context:\\nBrenvik is led by Sluba Merkast.\\n\\nQuestion: Who leads Brenvik?")
        >>> message.text.strip()
        'Sluba Merkast'
        >>> message.usage_metadata["input_tokens"] > 20
        True
    """

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed on to the chat template, such as ``{"enable_thinking": False}``."""
    explain_schema: bool = True
    """Say the JSON schema of a structured answer at the end of the prompt. The grammar keeps to it in any case; a model
    that knows what it is filling in does it better."""
    logprobs: bool = False
    """Return log-probabilities in ``response_metadata["logprobs"]``."""
    top_logprobs: int | None = None
    """Of this many most probable tokens beside each; implies ``logprobs``."""

    @property
    def _llm_type(self) -> str:
        return "layerstream-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("chat_template_kwargs", "explain_schema", "logprobs", "top_logprobs")
        return {**super()._identifying_params, **{name: getattr(self, name) for name in names}}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing("chat", stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What the model can do; nothing is loaded for it."""
        profile = ModelProfile(
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )
        length = self.engine.context_length if self.engine is not None else peek_context_length(self.model)
        if length is not None:
            profile["max_input_tokens"] = length
            profile["max_output_tokens"] = length
        return profile

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
        **kwargs: Any,
    ) -> int:
        """Tokens of the whole prompt: messages and *tools* as the chat template writes them."""
        given = [as_tool(tool) for tool in tools or ()]
        prompt = self.prompt_for(messages, tools=given, **kwargs)
        try:
            return len(self.load().encode(prompt))
        except PromptTooLong as error:  # whoever counts may be about to shorten it
            return error.num_tokens

    def prompt_for(self, messages: Sequence[BaseMessage], **kwargs: Any) -> str:
        """The text that the engine is given for *messages*."""
        return self._turn(self.load(), messages, None, kwargs).prompt

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with *tools*.

        Args:
            tool_choice: ``"auto"`` (default), ``"any"`` or ``True``: it must call one, ``"none"``, or a tool's name.
            parallel_tool_calls: several calls in one answer; ``None``: yes, where the model decides to call.
        """
        bound: dict[str, Any] = {"tools": [as_tool(tool) for tool in tools], **kwargs}
        if tool_choice is not None:
            bound["tool_choice"] = tool_choice
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        return self.bind(**bound)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers that follow *schema*: instances of a pydantic class, else dicts.

        An answer that was cut off is an error (``layerstream.AnswerCutOff``, LangChain's ``OutputParserException``); a
        stream of dicts grows and ends with it, and instances of a class come whole.

        Args:
            schema: a pydantic class, a ``TypedDict``, a JSON schema, or a tool in OpenAI's form.
            method: ``"json_schema"``: the answer is the JSON, and the prompt says the schema (``explain_schema``);
                ``"json_mode"``: the same, but the prompt is left as it is; ``"function_calling"``: the arguments of a
                call. With all three, what does not follow the schema cannot be said.
            include_raw: return ``{"raw", "parsed", "parsing_error"}``.
            strict: taken for the sake of other models; the grammar is always strict.
        """
        if kwargs:
            raise ValueError(f"with_structured_output has no option {', '.join(sorted(kwargs))}")
        if schema is None and method != "json_mode":
            raise ValueError(f"method {method!r} needs a schema")
        target = target_of(schema)
        traced = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema or {}}}
        if method == "function_calling":
            assert schema is not None
            name = convert_to_openai_tool(schema)["function"]["name"]
            model = self.bind_tools([schema], tool_choice=name, parallel_tool_calls=False, **traced)
            parser = AnswerParser(target=target, tool=name)
        elif method in ("json_schema", "json_mode"):
            wanted = {"type": "json_object"}
            if schema is not None:
                wanted = {"type": "json_schema", "schema": convert_to_json_schema(schema)}
            told = {} if method == "json_schema" else {"explain_schema": False}
            model = self.bind(response_format=wanted, **told, **traced)
            parser = AnswerParser(target=target)
        else:
            raise ValueError(f"method is {method!r}; expected 'json_schema', 'json_mode' or 'function_calling'")
        return with_raw(model, parser) if include_raw else model | parser

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
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
    ) -> AIMessage:
        """As :meth:`invoke`, without blocking the event loop."""
        return await super().ainvoke(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """As :meth:`invoke`, piece by piece."""
        return super().stream(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As :meth:`stream`, without blocking the event loop."""
        return super().astream(input, config, stop=stop, **{**self._configured(config), **kwargs})

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """All *inputs* in the same sweeps."""
        return run_batch(self.invoke, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As :meth:`batch`, on the event loop."""
        return await run_abatch(self.ainvoke, inputs, config, return_exceptions=return_exceptions, **kwargs)

    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        """Answers to several chats, in the same sweeps."""
        if len(messages) < 2 or kwargs.get("run_id") is not None:
            return super().generate(messages, *args, **kwargs)

        def one(chat: list[BaseMessage], _: RunnableConfig) -> LLMResult:
            return super(ChatLayerStream, self).generate([chat], *args, **kwargs)

        results = run_batch(one, messages, None, return_exceptions=False)
        return LLMResult(
            generations=[generations for result in results for generations in result.generations],
            llm_output=self._combine_llm_outputs([result.llm_output or {} for result in results]),
            run=[run for result in results for run in result.run or ()],
        )

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return add_usages(llm_outputs, self.model)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine = self.load()
        turn = self._turn(engine, messages, stop, kwargs)
        request = self._submit(engine, turn, kwargs)
        try:
            return self._result(turn, request.completions(), engine)
        finally:
            request.cancel()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        engine = await self._handle.get_async()
        turn, request = await self._ask_apart(engine, messages, stop, kwargs)
        try:
            await request
            return self._result(turn, request.completions(), engine)
        finally:
            request.cancel()

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        engine = self.load()
        turn = self._turn(engine, messages, stop, kwargs)
        check_stream(turn.params)
        request, chunks = self._submit(engine, turn, kwargs), ChunkStream(turn.reader())
        try:
            for delta in request:
                for chunk in self._chunks(delta, chunks, engine):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        finally:
            request.cancel()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        engine = await self._handle.get_async()
        turn, request = await self._ask_apart(engine, messages, stop, kwargs, streams=True)
        chunks = ChunkStream(turn.reader())
        try:
            async for delta in request:
                for chunk in self._chunks(delta, chunks, engine):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
        finally:
            request.cancel()

    def _turn(
        self, engine: LayerStream, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Turn:
        if not engine.has_chat_template:
            raise ConfigurationError(
                f"{self.model} has no chat template, so it cannot chat: use LayerStreamLLM, which takes text, or an "
                "instruct model"
            )
        self._check_call(kwargs, _CALL_OPTIONS)
        return engine.turn(
            arranged_messages(as_chat(messages), self.prompt_layout),
            self._sampling(stop, kwargs),
            tools=kwargs.get("tools"),
            tool_choice=kwargs.get("tool_choice"),
            parallel_tool_calls=kwargs.get("parallel_tool_calls"),
            explain_format=kwargs.get("explain_schema", self.explain_schema),
            **{**self.chat_template_kwargs, **kwargs.get("chat_template_kwargs", {})},
        )

    async def _ask_apart(
        self,
        engine: LayerStream,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        kwargs: dict[str, Any],
        *,
        streams: bool = False,
    ) -> tuple[Turn, Request]:
        """The model's turn, handed in; templates and tokens are no work for an event loop."""

        def ask() -> tuple[Turn, Request]:
            turn = self._turn(engine, messages, stop, kwargs)
            if streams:
                check_stream(turn.params)
            return turn, self._submit(engine, turn, kwargs)

        return await apart(ask, lambda asked: asked[1].cancel())

    def _submit(self, engine: LayerStream, turn: Turn, kwargs: dict[str, Any]) -> Request:
        join_gang(engine)
        with overflow_as_langchains():
            return engine.submit(turn.prompt, turn.params, **self._terms(kwargs))

    def _result(self, turn: Turn, completions: list[Completion], engine: LayerStream) -> ChatResult:
        generations = []
        for index, completion in enumerate(completions):
            message = as_message(turn.read(completion.text))
            message.usage_metadata = UsageMetadata(**usage_of(completion, num_prompts=int(index == 0)))
            message.response_metadata = self._metadata(completion, bool(message.tool_calls), engine)
            info = {"finish_reason": message.response_metadata["finish_reason"]}
            generations.append(ChatGeneration(message=message, generation_info=info))
        usage = [generation.message.usage_metadata for generation in generations]
        total = {
            "prompt_tokens": sum(item["input_tokens"] for item in usage),
            "completion_tokens": sum(item["output_tokens"] for item in usage),
            "total_tokens": sum(item["total_tokens"] for item in usage),
        }
        return ChatResult(generations=generations, llm_output={"token_usage": total, "model_name": self.model})

    def _chunks(self, delta: Delta, chunks: ChunkStream, engine: LayerStream) -> Iterator[ChatGenerationChunk]:
        """What *delta* adds."""
        if delta.completion is None:
            fresh = chunks.push(delta.text)
            if fresh is not None:
                yield ChatGenerationChunk(message=fresh)
            return
        *fresh, chunk = chunks.finish(delta.text)
        yield from (ChatGenerationChunk(message=message) for message in fresh)
        chunk.usage_metadata = UsageMetadata(**usage_of(delta.completion))
        chunk.response_metadata = self._metadata(delta.completion, chunks.has_calls, engine)
        chunk.chunk_position = "last"
        info = {"finish_reason": chunk.response_metadata["finish_reason"]}
        yield ChatGenerationChunk(message=chunk, generation_info=info)

    def _metadata(self, completion: Completion, has_calls: bool, engine: LayerStream) -> dict[str, Any]:
        reason = completion.finish_reason
        metadata = {
            "model_name": self.model,
            "model_provider": "layerstream",
            "finish_reason": "tool_calls" if has_calls and reason == "stop" else reason,
            "metrics": dataclasses.asdict(completion.metrics),
        }
        logprobs = logprobs_of(completion, engine)
        return metadata if logprobs is None else {**metadata, "logprobs": logprobs}
