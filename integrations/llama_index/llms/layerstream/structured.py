"""Structured answers: what the model is asked for, and the object that its answer spells out, growing or whole.

By default the answer is the JSON, as text; with ``PydanticProgramMode.FUNCTION`` it is the arguments of a call. An
answer that was cut off is an error and no object: LlamaIndex's own programs would complete it.
"""

from __future__ import annotations

import json
import logging
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.instrumentation import get_dispatcher  # pyright: ignore[reportPrivateImportUsage]
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
)
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.types import PydanticProgramMode

from layerstream.api.completion import why_cut_off
from layerstream.errors import AnswerCutOff

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

Model = TypeVar("Model", bound=BaseModel)

NATIVE_MODES = frozenset({PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION})
LIMIT = "max_new_tokens"
_UNFINISHED = ("length", "cancelled")


def options_for(output_cls: type[BaseModel], mode: PydanticProgramMode) -> dict[str, Any]:
    """Options of a call whose answer fills in *output_cls*."""
    if mode == PydanticProgramMode.FUNCTION:
        tool = get_function_tool(output_cls).metadata.to_openai_tool(skip_length_check=True)
        return {"tools": [tool], "tool_choice": tool["function"]["name"], "parallel_tool_calls": False}
    return {"response_format": {"type": "json_schema", "schema": output_cls.model_json_schema()}}


def partial(response: ChatResponse, output_cls: type[BaseModel], before: Any) -> Any:
    """What *response* fills in so far; *before* is what was filled in until then."""
    answer = CompletionResponse(text=_text(response))
    so_far = process_streaming_objects(answer, output_cls, cur_objects=None if before is None else [before])
    dispatcher.event(LLMStructuredPredictInProgressEvent(output=so_far))  # type: ignore[arg-type]
    return so_far


def finish(response: ChatResponse, output_cls: type[Model]) -> Model:
    """The answer as an *output_cls*.

    Raises:
        AnswerCutOff: it is not whole.
        ValueError: the class asks for what a schema cannot say.
    """
    text = _text(response)
    try:
        if not _is_whole(response):
            why = why_cut_off(finish_reason(response), LIMIT)
            raise AnswerCutOff(f"the answer is no {output_cls.__name__}: it {why}; found {text!r:.200}")
        output = output_cls.model_validate_json(text)
    except ValueError as error:  # LlamaIndex's synthesizers turn these into an empty response, without a word
        logger.error("%s", error)
        raise
    dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output


def finish_reason(response: ChatResponse) -> str | None:
    """Why the answer ended; ``None`` as long as it goes on."""
    return response.raw.get("finish_reason") if isinstance(response.raw, dict) else None


def check_whole(response: ChatResponse) -> None:
    """Refuse a finished answer that was cut off.

    Raises:
        AnswerCutOff: says what to do.
    """
    reason = finish_reason(response)
    if reason in _UNFINISHED:
        raise AnswerCutOff(f"the answer {why_cut_off(reason, LIMIT)}; found {_text(response)!r:.200}")


def check_calls(response: ChatResponse) -> None:
    """Refuse a finished answer with half a call in it.

    Raises:
        AnswerCutOff: says what to do.
    """
    reason = finish_reason(response)
    half = [block for block in _calls(response) if isinstance(block.tool_kwargs, str)]
    if reason is not None and half:
        raise AnswerCutOff(
            f"the call of {half[0].tool_name} {why_cut_off(reason, LIMIT)}; found {_text(response)!r:.200}"
        )


def _is_whole(response: ChatResponse) -> bool:
    """Whether nothing of the JSON is missing.

    A call is read once its arguments are closed. A text that is JSON may be the beginning of a longer one.
    """
    if calls := _calls(response):
        return isinstance(calls[0].tool_kwargs, dict)
    try:
        json.loads(response.message.content or "")
    except ValueError:
        return False
    return finish_reason(response) not in _UNFINISHED


def _calls(response: ChatResponse) -> list[ToolCallBlock]:
    return [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]


def _text(response: ChatResponse) -> str:
    """The JSON of the answer: of its first call, if there is one."""
    for block in _calls(response):
        kwargs = block.tool_kwargs
        return kwargs if isinstance(kwargs, str) else json.dumps(kwargs, ensure_ascii=False)
    return response.message.content or ""
