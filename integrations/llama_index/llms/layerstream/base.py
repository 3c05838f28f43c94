"""``LayerStreamLLM`` for LlamaIndex. Translation only; the engine does the work."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
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
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr, field_validator
from llama_index.core.instrumentation import get_dispatcher  # pyright: ignore[reportPrivateImportUsage]
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictStartEvent
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate
from llama_index.llms.layerstream import responses, structured
from llama_index.llms.layerstream.messages import arrange, as_chat, selections
from llama_index.llms.layerstream.responses import Asked, Reader
from llama_index.llms.layerstream.retrieved import watch_retrievers

from layerstream.api.apart import apart
from layerstream.api.params import SAMPLING_NAMES, SamplingParams, merge_params
from layerstream.api.prompt_layout import PromptLayout, arranged
from layerstream.errors import ToolError
from layerstream.handle import CALL_TERMS, TERMS, EngineHandle, check_call, check_fields, default_model, terms_of

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

    from layerstream.engine import LayerStream
    from layerstream.text.prompt import Prompt

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

Model = TypeVar("Model", bound=BaseModel)

_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logprobs", "top_logprobs",
)  # fmt: skip
_CALL_OPTIONS = frozenset(
    {"max_new_tokens", "tools", "tool_choice", "parallel_tool_calls", "explain_schema", "chat_template_kwargs",
     "top_logprobs", "formatted", "stream", "image_documents", *TERMS, *CALL_TERMS}
)  # fmt: skip


class LayerStreamLLM(FunctionCallingLLM):
    """A model whose weights stream past the compute, as a LlamaIndex LLM.

    Without arguments it runs the model that ``LAYERSTREAM_MODEL`` names, else the bundled reader. The model is loaded
    at first use; wrappers with the same model and ``engine_kwargs`` share one engine, which closes when the last of
    them is gone. Every model can be given tools and schemas: a grammar sees to it that calls and JSON are well-formed.

    Examples:
        >>> from llama_index.llms.layerstream import LayerStreamLLM
        >>> llm = LayerStreamLLM(model="demo", max_new_tokens=16)
        >>> prompt = "Context:\\nBrenvik is led by Sluba Merkast.\\n\\nQuestion: Who leads Brenvik?"
        >>> llm.complete(prompt).text.strip()
        'Sluba Merkast'
    """

    model: str = Field(default_factory=default_model, description="Folder, hub id, .gguf file or 'demo'.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the engine, such as memory.")
    max_new_tokens: int | None = Field(default=256, description="Tokens of an answer at most.")
    temperature: float | None = Field(default=None, description="0 is greedy; None is the model's own default.")
    top_p: float | None = Field(default=None, description="Share of probability that tokens are drawn from.")
    top_k: int | None = Field(default=None, description="Number of tokens that are drawn from.")
    min_p: float | None = Field(default=None, description="Least share of the best token's probability.")
    repetition_penalty: float | None = Field(default=None, description="Over prompt and answer; 1 is none.")
    presence_penalty: float | None = Field(default=None, description="For tokens that are in the answer.")
    frequency_penalty: float | None = Field(default=None, description="For each time they are.")
    seed: int | None = Field(default=None, description="Same seed, same prompt, same text.")
    logprobs: bool = Field(default=False, description="Return log-probabilities.")
    top_logprobs: int | None = Field(default=None, description="Of so many best tokens, too; implies logprobs.")
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer.")
    context_window: int | None = Field(default=None, description="Tokens of context; None is the engine's own.")
    timeout: float | None = Field(default=None, description="Seconds until an unfinished answer is given up.")
    priority: int = Field(default=0, description="Where requests wait for each other, more goes first.")
    client: str = Field(default="", description="Whom it is for; clients share the engine fairly.")
    tenant: str = Field(default="", description="Whose it is: no other tenant finds what it left in memory or on disk.")
    explain_schema: bool = Field(default=True, description="Say the schema of a structured answer in the prompt.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed on to the chat template.")
    prompt_layout: PromptLayout = Field(
        default="as_given", description="context_first: a labelled question goes behind a labelled, longer context."
    )

    _handle: EngineHandle = PrivateAttr()
    _formats_messages: bool = PrivateAttr(default=False)
    _formats_completions: bool = PrivateAttr(default=False)

    def __init__(self, model: str | None = None, *, engine: LayerStream | None = None, **fields: Any) -> None:
        check_fields(type(self).__name__, fields, type(self).model_fields)
        handle = EngineHandle(model, fields.get("engine_kwargs"), engine)
        if handle.reuses_anywhere:
            watch_retrievers()
        super().__init__(model=handle.model, **fields)
        self._handle = handle
        # not whether they were given: what is unpickled is given LlamaIndex's own
        self._formats_messages = self.messages_to_prompt is not generic_messages_to_prompt
        self._formats_completions = self.completion_to_prompt is not default_completion_to_prompt
        self._sampling({})  # a value out of range is said now

    def __getstate__(self) -> dict[str, Any]:
        self._handle.__getstate__()  # says it if it cannot be; LlamaIndex would leave it out
        return super().__getstate__()

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "LayerStreamLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by; loads the model's files if they are not yet."""
        engine = self.load()
        return LLMMetadata(
            context_window=self.context_window or engine.context_length,
            num_output=self.max_new_tokens or 256,
            is_chat_model=engine.has_chat_template or self._formats_messages,
            is_function_calling_model=engine.has_chat_template and not self._formats_messages,
            model_name=self.model,
        )

    def load(self) -> LayerStream:
        """The engine, loaded if it is not yet: its ``stats()``, ``plan`` and ``warm``."""
        return self._handle.get()

    def tokenize(self, text: str) -> list[int]:
        """The model's own token ids of *text*: for ``set_global_tokenizer`` and splitters."""
        return self.load().tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_for(self, messages: Sequence[ChatMessage]) -> Prompt:
        """What the engine is given for *messages*."""
        return self._chat_prompt(self.load(), messages, {})[0]

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; the chat template is put around it unless it is *formatted* already."""
        engine = self.load()
        return responses.complete(self._submit_text(engine, prompt, formatted, kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """As :meth:`complete`, piece by piece."""
        return responses.stream_text(self._submit_text(self.load(), prompt, formatted, kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As :meth:`complete`, without blocking the event loop."""
        return await responses.acomplete(await self._apart(self._submit_text, prompt, formatted, kwargs))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As :meth:`stream_complete`, without blocking the event loop."""
        return responses.astream_text(await self._apart(self._submit_text, prompt, formatted, kwargs))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer *messages*."""
        return responses.chat(self._submit_chat(self.load(), messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As :meth:`chat`, piece by piece."""
        return responses.stream_chat(self._submit_chat(self.load(), messages, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As :meth:`chat`, without blocking the event loop."""
        return await responses.achat(await self._apart(self._submit_chat, messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As :meth:`stream_chat`, without blocking the event loop."""
        return responses.astream_chat(await self._apart(self._submit_chat, messages, kwargs))

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        return {
            "messages": [*(chat_history or []), *([user_msg] if user_msg is not None else [])],
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice if tool_choice is not None else "any" if tool_required else "auto",
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls that a response asks for.

        Raises:
            AnswerCutOff: one of them is half, and the answer is over.
            ValueError: there are none, and *error_on_no_tool_call*.
        """
        structured.check_calls(response)
        found = selections(response.message)
        if not found and error_on_no_tool_call:
            structured.check_whole(response)
            raise ValueError(
                f"the model called no tool; it said {response.message.content!r:.200}: "
                "tool_required=True makes it call one"
            )
        return found

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,  # type: ignore[override]
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An *output_cls*, filled in by the model within a grammar of its schema."""
        if self.pydantic_program_mode not in structured.NATIVE_MODES:
            return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return structured.finish(self.chat(messages, **options), output_cls)

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,  # type: ignore[override]
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As :meth:`structured_predict`, without blocking the event loop."""
        if self.pydantic_program_mode not in structured.NATIVE_MODES:
            return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
        messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        return structured.finish(await self.achat(messages, **options), output_cls)

    @dispatcher.span
    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,  # type: ignore[override]
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        """As :meth:`structured_predict`, as far as it is filled in; the last one is whole."""
        if self.pydantic_program_mode not in structured.NATIVE_MODES:
            yield from super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]
            return
        messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        response, partial = None, None
        for response in self.stream_chat(messages, **options):
            partial = structured.partial(response, output_cls, partial)
            yield partial
        if response is not None:
            yield structured.finish(response, output_cls)

    @dispatcher.span
    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,  # type: ignore[override]
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        """As :meth:`stream_structured_predict`, without blocking the event loop."""
        if self.pydantic_program_mode not in structured.NATIVE_MODES:
            return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[arg-type]

        async def partials() -> AsyncGenerator[Any, None]:
            messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
            response, partial = None, None
            async for response in await self.astream_chat(messages, **options):
                partial = structured.partial(response, output_cls, partial)
                yield partial
            if response is not None:
                yield structured.finish(response, output_cls)

        return partials()

    def _structured(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Messages and options of a call that fills in *output_cls*."""
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        return messages, {**(llm_kwargs or {}), **structured.options_for(output_cls, self.pydantic_program_mode)}

    async def _apart(self, submit: Callable[..., Asked], *asked: Any) -> Asked:
        """What *submit* makes of the engine and what is *asked*; templates and tokens are no work for an event loop."""
        engine = await self._handle.get_async()
        return await apart(lambda: submit(engine, *asked), lambda made: made.request.cancel())

    def _submit_text(self, engine: LayerStream, text: str, formatted: bool, kwargs: dict[str, Any]) -> Asked:
        if not formatted or not (
            engine.has_chat_template or self._formats_completions
        ):  # else it has an end of its own
            text = arranged(text, self.prompt_layout)
        if formatted:
            return self._submit(engine, text, self._sampling(kwargs), None, kwargs)
        if self._formats_completions:
            return self._submit(engine, self.completion_to_prompt(text), self._sampling(kwargs), None, kwargs)  # type: ignore[misc]
        if not engine.has_chat_template:
            prompt = f"{self.system_prompt}\n\n{text}" if self.system_prompt else text
            return self._submit(engine, prompt, self._sampling(kwargs), None, kwargs)
        messages = self._extend_messages([ChatMessage(role=MessageRole.USER, content=text)])
        return self._submit_chat(engine, messages, kwargs)

    def _submit_chat(self, engine: LayerStream, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> Asked:
        try:
            prompt, params, reader = self._chat_prompt(engine, messages, kwargs)
        except ValueError as error:  # LlamaIndex's synthesizers turn these into an empty response, without a word
            logger.error("%s", error)
            raise
        return self._submit(engine, prompt, params, reader, kwargs)

    def _chat_prompt(
        self, engine: LayerStream, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> tuple[Prompt, SamplingParams, Reader]:
        params, messages = self._sampling(kwargs), arrange(messages, self.prompt_layout)
        if self._formats_messages or not engine.has_chat_template:
            if kwargs.get("tools"):
                raise ToolError(
                    f"{self.model} cannot be given tools: they go through its chat template, and "
                    + ("messages_to_prompt stands in its place" if engine.has_chat_template else "it has none")
                )
            return self.messages_to_prompt(messages), params, None  # type: ignore[misc]
        turn = engine.turn(
            as_chat(messages),
            params,
            tools=kwargs.get("tools"),
            tool_choice=kwargs.get("tool_choice"),
            parallel_tool_calls=kwargs.get("parallel_tool_calls"),
            explain_format=kwargs.get("explain_schema", self.explain_schema),
            **{**self.chat_template_kwargs, **kwargs.get("chat_template_kwargs", {})},
        )
        return turn.prompt, turn.params, turn.reader()

    def _submit(
        self, engine: LayerStream, prompt: Prompt, params: SamplingParams, reader: Reader, kwargs: dict[str, Any]
    ) -> Asked:
        try:
            return Asked(engine.submit(prompt, params, **terms_of(self, kwargs)), reader, engine.tokenizer.decode)
        except ValueError as error:  # as above
            logger.error("%s", error)
            raise

    def _sampling(self, kwargs: dict[str, Any]) -> SamplingParams:
        """The instance's fields, overridden by the call's; stop strings of both."""
        check_call(type(self).__name__, self.model, kwargs, SAMPLING_NAMES | _CALL_OPTIONS)
        own = {name: getattr(self, name) for name in (*_SAMPLING_FIELDS, "stop")}
        own["max_tokens"] = kwargs.get("max_new_tokens", self.max_new_tokens)
        return merge_params(own, kwargs)
