"""Answers that ended before they were whole: no object and no call comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from layerstream import AnswerCutOff
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.layerstream import LayerStreamLLM
from pydantic import BaseModel

from tests.integrations.fake_engine import FakeEngine


class Unit(BaseModel):
    """A unit."""

    name: str
    leader: str = "nobody"


def search(query: str, count: int = 3) -> str:
    """Finds documents."""
    raise AssertionError("half a call was made")


TOOL = FunctionTool.from_defaults(search)
ABOUT = PromptTemplate("Tell me about {what}.")
VALUE = '{"name": "Brenvik", "leader": "Sluba Merkast"}'
CUTS = [(0, "length"), (1, "stop"), (20, "length"), (40, "length"), (40, "stop"), (len(VALUE) - 1, "cancelled")]
MODES = [PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Sluba Merk'


def make(text: str, reason: Any, **fields: Any) -> LayerStreamLLM:
    engine = FakeEngine(has_chat_template=True)
    engine.words = [text[at : at + 5] for at in range(0, len(text), 5)] or [""]
    engine.reason = reason
    return LayerStreamLLM(engine=engine, **fields)


def _last(stream: Any) -> Any:
    *_, last = stream
    return last


def _astream(llm: LayerStreamLLM) -> Any:
    async def run() -> Any:
        return [part async for part in await llm.astream_structured_predict(Unit, ABOUT, what="x")][-1]

    return asyncio.run(run())


WAYS: dict[str, Callable[[LayerStreamLLM], Any]] = {
    "predict": lambda llm: llm.structured_predict(Unit, ABOUT, what="x"),
    "apredict": lambda llm: asyncio.run(llm.astructured_predict(Unit, ABOUT, what="x")),
    "stream": lambda llm: _last(llm.stream_structured_predict(Unit, ABOUT, what="x")),
    "astream": _astream,
    "structured llm": lambda llm: llm.as_structured_llm(Unit).chat([ChatMessage(content="x")]).raw,
    "structured llm streams": lambda llm: (
        list(llm.as_structured_llm(Unit).stream_chat([ChatMessage(content="x")]))[-1].raw
    ),
    "structured llm completes": lambda llm: llm.as_structured_llm(Unit).complete("x").raw,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_half_an_answer_is_an_error_and_a_whole_one_its_object(mode: PydanticProgramMode, way: str) -> None:
    is_call = mode == PydanticProgramMode.FUNCTION
    opening, closing = ('<tool_call>\n{"name": "Unit", "arguments": ', "}\n</tool_call>") if is_call else ("", "")
    for cut, reason in CUTS:
        llm = make(opening + VALUE[:cut], reason, pydantic_program_mode=mode)
        with pytest.raises(AnswerCutOff, match="max_new_tokens" if reason == "length" else "the answer"):
            WAYS[way](llm)
    llm = make(opening + VALUE + closing, "stop", pydantic_program_mode=mode)
    assert WAYS[way](llm) == Unit.model_validate_json(VALUE)


@pytest.mark.parametrize("mode", MODES)
def test_objects_grow(mode: PydanticProgramMode) -> None:
    opening = '<tool_call>\n{"name": "Unit", "arguments": ' if mode == PydanticProgramMode.FUNCTION else ""
    parts = list(
        make(opening + VALUE, "stop", pydantic_program_mode=mode).stream_structured_predict(Unit, ABOUT, what="x")
    )
    assert "Brenvik" in [part.name for part in parts[:-3]], "it is there before all of it is"


def test_half_a_call_is_not_answered_with_the_advice_to_require_one() -> None:
    llm = make(CALL, "length")
    for ask in (
        lambda: llm.predict_and_call([TOOL], "find", tool_required=True),
        lambda: asyncio.run(llm.apredict_and_call([TOOL], "find", tool_required=True)),
        lambda: llm.get_tool_calls_from_response(llm.chat_with_tools([TOOL], "find"), error_on_no_tool_call=False),
        lambda: llm.get_tool_calls_from_response(list(llm.stream_chat_with_tools([TOOL], "find"))[-1]),
    ):
        with pytest.raises(AnswerCutOff, match="max_new_tokens"):
            ask()


def test_a_text_that_was_cut_off_before_it_could_call() -> None:
    llm = make("Let me think about", "length")
    response = llm.chat_with_tools([TOOL], "find")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(AnswerCutOff, match="max_new_tokens"):
        llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_agent_does_not_run_half_a_call(streaming: bool) -> None:
    agent = FunctionAgent(tools=[TOOL], llm=make(CALL, "length"), streaming=streaming)
    with pytest.raises(Exception, match="allow more tokens"):
        await agent.run("find")
