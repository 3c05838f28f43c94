"""Answers that ended before they were whole: no value comes of them, whatever they were asked for and however."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.json import parse_partial_json
from langchain_layerstream import ChatLayerStream, LayerStreamLLM
from langchain_layerstream.messages import cut_off_mark
from layerstream import AnswerCutOff
from pydantic import BaseModel
from pydantic.v1 import BaseModel as BaseModelV1

from tests.integrations.fake_engine import FakeEngine


class Unit(BaseModel):
    """A unit."""

    name: str
    leader: str = "nobody"


class UnitV1(BaseModelV1):
    """A unit."""

    name: str
    leader: str = "nobody"


class UnitDict(TypedDict):
    """A unit."""

    name: str
    leader: str


@tool
def search(query: str, count: int = 3) -> str:
    """Finds documents."""
    raise AssertionError("half a call was made")


SCHEMAS = [Unit, UnitV1, UnitDict, Unit.model_json_schema()]
METHODS = ["json_schema", "json_mode", "function_calling"]
VALUE = '{"name": "Brenvik", "leader": "Sluba Merkast"}'
CUTS = [(0, "length"), (1, "stop"), (20, "length"), (40, "length"), (40, "stop"), (len(VALUE) - 1, "cancelled")]


def _stream(chain: Any) -> Any:
    *_, last = chain.stream("x")
    return last


def _astream(chain: Any) -> Any:
    async def run() -> Any:
        return [value async for value in chain.astream("x")][-1]

    return asyncio.run(run())


WAYS: dict[str, Callable[[Any], Any]] = {
    "invoke": lambda chain: chain.invoke("x"),
    "stream": _stream,
    "ainvoke": lambda chain: asyncio.run(chain.ainvoke("x")),
    "astream": _astream,
    "batch": lambda chain: chain.batch(["x", "x"])[1],
    "abatch": lambda chain: asyncio.run(chain.abatch(["x", "x"]))[1],
}


def call_text(arguments: str, name: str = "Unit") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}'


def make(text: str, reason: Any, kind: Any = ChatLayerStream) -> Any:
    engine = FakeEngine(has_chat_template=True)
    engine.words = [text[at : at + 3] for at in range(0, len(text), 3)] or [""]
    engine.reason = reason
    return kind(engine=engine)


def answer(method: str, schema: Any, value: str) -> str:
    return value if method != "function_calling" else call_text(value, getattr(schema, "__name__", "Unit"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_half_an_answer_is_an_error_and_a_whole_one_its_value(schema: Any, method: Any, way: str) -> None:
    for cut, reason in CUTS:
        llm = make(answer(method, schema, VALUE[:cut]), reason)
        with pytest.raises(AnswerCutOff, match="max_tokens" if reason == "length" else "the answer") as caught:
            WAYS[way](llm.with_structured_output(schema, method=method))
        assert isinstance(caught.value, OutputParserException)
    raw = WAYS[way](llm.with_structured_output(schema, method=method, include_raw=True))
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], AnswerCutOff)
    assert isinstance(raw["raw"], AIMessage)
    whole = make(answer(method, schema, VALUE) + ("}\n</tool_call>" if method == "function_calling" else ""), "stop")
    value = WAYS[way](whole.with_structured_output(schema, method=method))
    raw = WAYS[way](whole.with_structured_output(schema, method=method, include_raw=True))
    assert value == raw["parsed"]
    assert raw["parsing_error"] is None
    assert value == (schema(**json.loads(VALUE)) if schema in (Unit, UnitV1) else json.loads(VALUE))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_half_a_text_is_an_error_too(schema: Any, way: str) -> None:
    for cut, reason in CUTS:
        llm = make(VALUE[:cut], reason, LayerStreamLLM)
        with pytest.raises(AnswerCutOff):
            WAYS[way](llm.with_structured_output(schema))
    assert WAYS[way](make(VALUE, "stop", LayerStreamLLM).with_structured_output(UnitDict)) == json.loads(VALUE)


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
@pytest.mark.parametrize("way", WAYS)
def test_a_number_may_go_on(kind: Any, way: str) -> None:
    schema = {"title": "age", "description": "An age.", "type": "integer"}
    with pytest.raises(AnswerCutOff):
        WAYS[way](make("12", "length", kind).with_structured_output(schema))
    assert WAYS[way](make("12", "stop", kind).with_structured_output(schema)) == 12


def test_dicts_grow_and_instances_come_whole() -> None:
    grown = list(make(VALUE, "stop").with_structured_output(UnitDict).stream("x"))
    assert len(grown) > 5
    assert grown[-1] == json.loads(VALUE)
    assert list(make(VALUE, "stop").with_structured_output(Unit).stream("x")) == [Unit(**json.loads(VALUE))]


def test_a_class_that_refuses_what_its_schema_allows_is_no_cut_off_answer() -> None:
    class Even(BaseModel):
        """An even number."""

        value: int

        def model_post_init(self, _: Any) -> None:
            if self.value % 2:
                raise ValueError("odd")

    llm = make('{"value": 3}', "stop").with_structured_output(Even)
    with pytest.raises(ValueError, match="odd") as caught:
        llm.invoke("x")
    assert not isinstance(caught.value, AnswerCutOff)


ARGUMENTS = '{"query": "a\\"b {c", "count": 2, "more": [{"x": [1, 2]}, "]"]}'


@given(st.integers(0, len(ARGUMENTS) - 1))
def test_what_is_cut_off_anywhere_is_marked_so_that_nobody_completes_it(cut: int) -> None:
    half = ARGUMENTS[:cut]
    assert not isinstance(parse_partial_json(half + cut_off_mark(half)), dict)


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    st.data(),
)
def test_so_are_any_other_arguments(value: Any, data: st.DataObject) -> None:
    text = json.dumps({"value": value}, ensure_ascii=data.draw(st.booleans()))
    half = text[: data.draw(st.integers(0, len(text) - 1))]
    assert not isinstance(parse_partial_json(half + cut_off_mark(half)), dict)


@pytest.mark.parametrize("cut", [1, 5, 12, 14, 17, 30, 45, len(ARGUMENTS) - 1])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_half_a_call_is_invalid_in_chunks_as_in_a_message(cut: int, reason: str) -> None:
    llm = make(call_text(ARGUMENTS[:cut], "search"), reason).bind_tools([search])
    message = llm.invoke("find")
    chunks = list(llm.stream("find"))
    for whole in (sum(chunks[1:], chunks[0]), chunks[0] + chunks[1:] if len(chunks) > 1 else chunks[0]):
        assert isinstance(whole, AIMessageChunk)
        assert whole.tool_calls == message.tool_calls == []
        (invalid,), (expected,) = whole.invalid_tool_calls, message.invalid_tool_calls
        assert {**invalid, "error": expected["error"]} == expected
        assert invalid["args"].startswith(ARGUMENTS[:cut])
        assert whole.response_metadata["finish_reason"] == message.response_metadata["finish_reason"] == reason


def test_an_invocation_that_streams_for_its_callbacks_makes_no_call_of_it() -> None:
    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **_: Any) -> None:
            pass

    llm = make(call_text('{"query": "Sluba Merk', "search"), "length")
    for fields in ({}, {"streaming": True}):
        bound = llm.model_copy(update=fields).bind_tools([search])
        message = bound.invoke("find", config={"callbacks": [Listener()]})
        assert message.tool_calls == []
        assert message.invalid_tool_calls[0]["args"].startswith('{"query": "Sluba Merk')


def test_several_calls_of_which_the_last_is_half() -> None:
    text = call_text('{"query": "a"}}\n</tool_call>\n', "search") + call_text('{"query": "b', "search")
    llm = make(text, "length").bind_tools([search])
    chunks = list(llm.stream("find"))
    whole, message = sum(chunks[1:], chunks[0]), llm.invoke("find")
    assert [call["args"] for call in whole.tool_calls] == [{"query": "a"}]
    assert whole.tool_calls == message.tool_calls
    assert len(whole.invalid_tool_calls) == 1


@pytest.mark.parametrize("end", ['"}', '"}}\n</tool_call>'])
def test_a_call_that_ends_with_the_last_chunk_is_whole_in_content_blocks_and_events(end: str) -> None:
    llm = make(call_text('{"query": "ab' + end, "search"), "stop")
    chunks = list(llm.model_copy(update={"output_version": "v1"}).bind_tools([search]).stream("find"))
    whole = sum(chunks[1:], chunks[0])
    assert [(block["type"], block.get("args")) for block in whole.content_blocks] == [("tool_call", {"query": "ab"})]
    events = getattr(llm.bind_tools([search]), "stream_events", None)
    if "v3" in str(getattr(events, "__doc__", "")):
        assert [call["args"] for call in events("find", version="v3").output.tool_calls] == [{"query": "ab"}]


def test_an_agent_does_not_run_half_a_call() -> None:
    agents = pytest.importorskip("langchain.agents")
    agent = agents.create_agent(make(call_text('{"query": "Sluba Merk', "search"), "length"), [search])
    asked = {"messages": [HumanMessage("find")]}
    ran = [agent.invoke(asked)["messages"]]
    ran.append([message for message, _ in agent.stream(asked, stream_mode="messages")])
    for messages in ran:
        assert not any(isinstance(message, ToolMessage) for message in messages)
