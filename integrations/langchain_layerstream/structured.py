"""From an answer to the value that it spells out: whole, or an error that says what to do.

The grammar makes every finished answer right, so what can go wrong is that an answer does not finish: ``max_tokens``, a
full context, a stop string in the middle of a value. LangChain's own parsers complete what is cut off, and half a name
then passes for a name; here a part is no value. Streams of dicts still grow, and end with the error.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers.transform import BaseTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from layerstream.api.completion import why_cut_off
from pydantic import ValidationError
from pydantic.v1 import ValidationError as ValidationErrorV1

from langchain_layerstream._errors import OutputCutOff

_UNFINISHED = ("length", "cancelled")


class AnswerParser(BaseTransformOutputParser[Any]):
    """Reads the JSON of an answer, or the arguments of its call.

    Attributes:
        target: the pydantic class (of version 1 or 2) to make instances of; ``None``: dicts.
        tool: the tool whose call has the value; ``None``: the text of the answer is the value.
    """

    target: Any = None
    tool: str | None = None

    @property
    def OutputType(self) -> Any:  # noqa: N802  # LangChain's name
        """What comes out."""
        return dict if self.target is None else self.target

    @property
    def _type(self) -> str:
        return "layerstream_answer"

    def parse(self, text: str) -> Any:
        """The value that *text* spells out."""
        return self.parse_result([Generation(text=text)])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The value of an answer.

        Args:
            partial: as far as it is there; ``None`` where nothing is, and for classes, whose instances are whole.

        Raises:
            OutputCutOff: it is not whole.
            OutputParserException: the class refuses what its schema allows.
        """
        if partial:
            return None if self.target is not None else self._so_far(result[0])
        text = self._whole(result[0])
        return json.loads(text) if self.target is None else self._instance(text)

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        growing = _Growing(self)
        for chunk in input:
            yield from growing.add(chunk)
        yield from growing.finish()

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        growing = _Growing(self)
        async for chunk in input:
            for value in growing.add(chunk):
                yield value
        for value in growing.finish():
            yield value

    def _so_far(self, answer: Generation) -> Any:
        text = answer.text.strip() if self.tool is None else self._arguments(answer)
        try:
            return parse_partial_json(text) if text else None
        except ValueError:
            return None

    def _whole(self, answer: Generation) -> str:
        """The JSON of a finished answer.

        The arguments of a call are there once they are closed, if only its end mark is missing. A text that is JSON may
        be the beginning of a longer one, such as a number.
        """
        reason = answer.message.response_metadata.get("finish_reason") if isinstance(answer, ChatGeneration) else None
        text = answer.text.strip() if self.tool is None else self._arguments(answer)
        if not _is_json(text) or (self.tool is None and reason in _UNFINISHED):
            said = text or answer.text
            raise OutputCutOff(f"the answer {why_cut_off(reason)}; found {said!r:.200}", llm_output=said)
        return text

    def _arguments(self, answer: Generation) -> str:
        """The arguments of the call, as JSON; nothing where there is no call that is complete."""
        message = answer.message if isinstance(answer, ChatGeneration) else None
        calls = message.tool_calls if isinstance(message, AIMessage) else []
        found = next((call for call in calls if call["name"] == self.tool), None)
        return "" if found is None else json.dumps(found["args"], ensure_ascii=False)

    def _instance(self, text: str) -> Any:
        try:
            if hasattr(self.target, "model_validate_json"):
                return self.target.model_validate_json(text)
            return self.target.parse_raw(text)
        except (ValidationError, ValidationErrorV1) as error:
            raise OutputParserException(
                f"the answer follows the schema of {self.target.__name__}, and the class refuses it: {error}",
                llm_output=text,
            ) from error


class _Growing:
    """A stream's answer as far as it has come."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._whole: Any = None
        self._last: Any = None

    def add(self, chunk: str | BaseMessage) -> list[Any]:
        """The value so far, if *chunk* changed it."""
        self._whole = chunk if self._whole is None else self._whole + chunk
        return self._fresh(partial=True)

    def finish(self) -> list[Any]:
        """The whole value, if it was not there yet."""
        return self._fresh(partial=False)

    def _fresh(self, *, partial: bool) -> list[Any]:
        whole = "" if self._whole is None else self._whole
        answer = ChatGeneration(message=whole) if isinstance(whole, BaseMessage) else Generation(text=whole)
        value = self._parser.parse_result([answer], partial=partial)
        if value is None or value == self._last:
            return []
        self._last = value
        return [value]


def target_of(schema: Any) -> Any:
    """The class to make instances of; ``None`` for schemas of dicts."""
    return schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None


def with_raw(model: Runnable[Any, Any], parser: AnswerParser) -> Runnable[Any, dict[str, Any]]:
    """*model* with *parser* behind it: ``{"raw", "parsed", "parsing_error"}``."""

    def parse(found: dict[str, Any]) -> dict[str, Any]:
        return {"raw": found["raw"], "parsed": parser.invoke(found["raw"]), "parsing_error": None}

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        return {"raw": found["raw"], "parsed": None, "parsing_error": found["parsing_error"]}

    parsed = RunnableLambda(parse).with_fallbacks([RunnableLambda(keep)], exception_key="parsing_error")
    return RunnableMap(raw=model) | parsed


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
