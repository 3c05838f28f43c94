"""``ChatLayerStream``: messages, tools and schemas reach the engine, and replies come back as LangChain's messages."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, TypedDict

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_layerstream import ChatLayerStream, LayerStreamLLM
from layerstream import LayerStream
from layerstream.errors import ConfigurationError, GrammarError, PromptError, PromptTooLong, ToolError
from pydantic import BaseModel, Field, ValidationError

from tests.chat.families import make_turns
from tests.integrations.fake_engine import WORDS, FakeEngine

TEXT = "".join(WORDS)
CALL = [
    "Let me",
    ' see.\n<tool_call>\n{"name": "sea',
    'rch", "argum',
    'ents": {"query": "a',
    'b", "count": 2}}\n',
    "</tool_call>",
]


@tool
def search(query: str, count: int = 3) -> str:
    """Finds documents."""
    return query * count


class Unit(BaseModel):
    """A unit."""

    name: str = Field(max_length=6)
    founded: int = Field(ge=1000, le=2099)


class UnitDict(TypedDict):
    """A unit."""

    founded: bool


def make(words: list[str] | None = None, holds_back: bool = False, **fields: Any) -> tuple[ChatLayerStream, FakeEngine]:
    engine = fields.pop("engine", None) or FakeEngine(has_chat_template=True, holds_back=holds_back)
    engine.words = words or WORDS
    return ChatLayerStream(engine=engine, **fields), engine


def test_a_message_has_text_usage_and_metadata() -> None:
    llm, engine = make()
    message = llm.invoke([SystemMessage("Be brief."), HumanMessage("who?")])
    assert isinstance(message, AIMessage)
    assert message.content == TEXT
    assert engine.batches == [["<s><|system|>Be brief.<|user|>who?<|assistant|>"]]
    assert message.usage_metadata == {
        "input_tokens": 7, "output_tokens": 4, "total_tokens": 11, "input_token_details": {"cache_read": 0},
    }  # fmt: skip
    assert message.response_metadata["model_name"] == "fake"
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["metrics"]["sweeps"] == 4


def test_chunks_add_up_to_the_message() -> None:
    llm, _ = make()
    chunks = list(llm.stream("who?"))
    assert [chunk.content for chunk in chunks] == WORDS
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * 3 + [True]
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == llm.invoke("who?").content
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_call_is_read_whole_and_in_pieces() -> None:
    llm, engine = make(CALL)
    bound = llm.bind_tools([search])
    message = bound.invoke("find")
    assert message.content == "Let me see.\n"
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("search", {"query": "ab", "count": 2})]
    assert message.response_metadata["finish_reason"] == "tool_calls"
    whole: Any = None
    for chunk in bound.stream("find"):
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.tool_calls == message.tool_calls
    assert whole.content == message.content
    assert '"name": "search"' in engine.batches[0][0], "the template was given the tools"
    assert engine.params[0].response_format["type"] == "grammar"


def test_pieces_of_arguments_pass_on_as_they_come() -> None:
    llm, _ = make(CALL)
    parts = [part for chunk in llm.bind_tools([search]).stream("find") for part in chunk.tool_call_chunks]  # type: ignore[attr-defined]
    assert parts[0]["name"] == "search"
    assert parts[0]["id"]
    assert len(parts) > 1
    assert {part["index"] for part in parts} == {0}
    assert "".join(part["args"] or "" for part in parts) == '{"query": "ab", "count": 2}'


def test_a_call_that_was_cut_off_is_invalid_and_says_why() -> None:
    llm, _ = make(CALL[:4])
    message = llm.bind_tools([search]).invoke("find")
    assert message.tool_calls == []
    assert "max_tokens" in message.invalid_tool_calls[0]["error"]


def test_history_with_calls_goes_back_through_the_template() -> None:
    llm, engine = make()
    call = {"name": "search", "args": {"query": "x"}, "id": "1"}
    llm.invoke([HumanMessage("find"), AIMessage("", tool_calls=[call]), ToolMessage("found", tool_call_id="1")])
    (prompt,) = engine.batches[0]
    assert '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>' in prompt
    assert prompt.endswith("<|tool|>found<|assistant|>")


def test_thoughts_are_reasoning() -> None:
    llm, engine = make(["<think>", "hm", "m</think>", "\n\nyes"])
    engine._turns = make_turns("qwen 3")[0]
    message = llm.invoke("who?")
    assert message.content == "yes"
    assert message.additional_kwargs["reasoning_content"] == "hmm"
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]


def test_every_member_of_a_batch_is_in_one_gang() -> None:
    llm, engine = make()
    chain = llm | (lambda message: message.content)
    assert chain.batch([str(number) for number in range(40)]) == [TEXT] * 40
    assert engine.gangs == [40]
    llm.generate([[HumanMessage("a")], [HumanMessage("b")]])
    assert engine.gangs == [40, 2]


async def test_abatch_is_one_gang_too() -> None:
    llm, engine = make()
    assert len(await llm.bind(stop=["x"]).abatch(["a"] * 9)) == 9
    assert engine.gangs == [9]


async def test_cancelling_an_invocation_cancels_its_request() -> None:
    llm, engine = make(holds_back=True)
    task = asyncio.create_task(llm.ainvoke("who?"))
    while not engine.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.requests[0] in engine.cancelled


async def test_an_abandoned_stream_is_cancelled() -> None:
    llm, engine = make(holds_back=True)
    stream = llm.astream("who?")

    async def feed() -> None:
        while not engine.requests:
            await asyncio.sleep(0)
        engine.release(engine.requests[0], 1)

    feeder = asyncio.create_task(feed())
    assert (await anext(stream)).content == WORDS[0]
    await stream.aclose()  # type: ignore[attr-defined]
    await feeder
    assert engine.requests[0] in engine.cancelled


def test_leaving_a_stream_cancels_its_request() -> None:
    llm, engine = make(holds_back=True)
    stream = llm.stream("who?")
    feeder = threading.Thread(target=lambda: engine.submitted.wait(10) and engine.release(engine.requests[0], 2))
    feeder.start()
    assert next(stream).content == WORDS[0]
    stream.close()  # type: ignore[attr-defined]
    feeder.join()
    assert engine.requests[0] in engine.cancelled


def test_callbacks_hear_every_token_once() -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.tokens.append(token)

    for fields in ({}, {"streaming": True}):
        handler = Tokens()
        llm, _ = make(**fields)
        config: Any = {"callbacks": [handler]}
        if fields:
            llm.invoke("who?", config=config)
        else:
            list(llm.stream("who?", config=config))
        assert handler.tokens == WORDS


def test_a_cache_knows_answers_by_all_that_they_depend_on() -> None:
    engine = FakeEngine(has_chat_template=True)
    cache = InMemoryCache()
    for fields in ({}, {}, {"seed": 3}, {"chat_template_kwargs": {"a": 1}}, {"stop": "x"}, {"top_logprobs": 2}):
        make(engine=engine, cache=cache, **fields)[0].invoke("who?")
    assert len(engine.batches) == 5, "the second of the first two was known"


def test_terms_reach_the_engine() -> None:
    llm, engine = make(timeout=3.0, priority=2, client="alice", tenant="acme")
    llm.invoke("who?")
    llm.invoke("who?", timeout=1.0)
    assert engine.terms[0] == {"timeout": 3.0, "priority": 2, "client": "alice", "tenant": "acme"}
    assert engine.terms[1]["timeout"] == 1.0


def test_tracing_params_are_the_calls() -> None:
    llm, _ = make(temperature=0.5, max_tokens=9, stop=["a"])
    params = llm._get_ls_params(stop=["b"], temperature=0.7)
    assert params["ls_provider"] == "layerstream"
    assert params["ls_model_name"] == "fake"
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.7, 9, ["a", "b"])


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("schema", [Unit, UnitDict, {"title": "Unit", **Unit.model_json_schema()}])
def test_structured_answers_of_a_model_that_babbles(method: Any, schema: Any) -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = ChatLayerStream(engine=engine, max_tokens=60, seed=2)
        result = llm.with_structured_output(schema, method=method).invoke("Tell me about Brenvik.")
    if schema is Unit:
        assert isinstance(result, Unit)
    else:
        assert set(result) == ({"founded"} if schema is UnitDict else {"name", "founded"})


def test_the_schema_is_said_last_so_that_what_is_before_it_keeps_its_kv() -> None:
    llm, engine = make(['{"founded": true}'])
    llm.with_structured_output(UnitDict).invoke([SystemMessage("context"), HumanMessage("when?")])
    llm.with_structured_output(UnitDict, method="json_mode").invoke([SystemMessage("context"), HumanMessage("when?")])
    told, untold = (batch[0] for batch in engine.batches)
    common = untold.removesuffix("<|assistant|>")
    assert told.startswith(common)
    assert '"founded"' in told.removeprefix(common)


def test_include_raw_keeps_what_cannot_be_parsed() -> None:
    llm, _ = make(["not JSON"])
    result = llm.with_structured_output(Unit, include_raw=True).invoke("x")
    assert result["raw"].content == "not JSON"
    assert result["parsed"] is None
    assert result["parsing_error"] is not None


def test_logprobs_are_openais() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = ChatLayerStream(engine=engine, max_tokens=3, top_logprobs=2)
        content = llm.invoke("Who leads Brenvik?").response_metadata["logprobs"]["content"]
        last = list(llm.stream("Who leads Brenvik?"))[-1].response_metadata["logprobs"]["content"]
    assert len(content) == 3
    assert len(content[0]["top_logprobs"]) == 2
    assert content[0]["logprob"] <= 0
    assert content == last


def test_tokens_are_counted_with_the_models_own_template() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = ChatLayerStream(engine=engine)
        messages = [HumanMessage("Who leads Brenvik?")]
        alone = llm.get_num_tokens_from_messages(messages)
        assert alone == len(engine.encode([{"role": "user", "content": "Who leads Brenvik?"}]))
        assert llm.get_num_tokens_from_messages(messages, tools=[search]) > alone + 20


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"memory": "3GiB"}, r"engine_kwargs=\{'memory': '3GiB'\}"),
        ({"temperature": -1}, r"temperature is -1"),
        ({"stop": 3}, "stop"),
    ],
)
def test_a_wrong_field_says_what_to_do(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ChatLayerStream(**fields)


def test_a_wrong_call_says_what_to_do() -> None:
    llm, engine = make()
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}}
    for call, error, says in [
        (lambda: llm.invoke("x", temprature=1), ConfigurationError, "did you mean 'temperature'"),
        (lambda: llm.invoke("x", model="other"), ConfigurationError, r"ChatLayerStream\(model='other'\)"),
        (lambda: llm.invoke([HumanMessage([picture])]), PromptError, "'image_url'"),
        (lambda: llm.bind_tools([search], tool_choice="find").invoke("x"), ToolError, "there: search"),
        (lambda: llm.with_structured_output(Unit, method="xml"), ValueError, "'function_calling'"),  # type: ignore[arg-type]
        (lambda: llm.with_structured_output(Unit, tools=[]), ValueError, "no option tools"),
        (lambda: llm.with_structured_output(None), ValueError, "needs a schema"),
        (lambda: list(llm.stream("x", n=2)), ConfigurationError, "generate"),
    ]:
        with pytest.raises(error, match=says):
            call()
    assert engine.batches == [], "nothing was begun"
    with pytest.raises(ConfigurationError, match="LayerStreamLLM"):
        ChatLayerStream(engine=FakeEngine()).invoke("x")
    schema = {"title": "x", "type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with LayerStream("demo", kv_store=None, progress=False) as real, pytest.raises(GrammarError, match="uniqueItems"):
        ChatLayerStream(engine=real).with_structured_output(schema).invoke("x")


def test_openais_options_may_stand_in_a_call_or_a_binding() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = ChatLayerStream(engine=engine, max_tokens=2)
        for ask, num_top in [
            (lambda: llm.invoke("x", logprobs=True, top_logprobs=2), 2),
            (lambda: llm.bind(logprobs=True).invoke("x"), 0),
            (lambda: llm.bind(top_logprobs=1).invoke("x"), 1),
            (lambda: list(llm.stream("x", logprobs=True, top_logprobs=2))[-1], 2),
            (lambda: ChatLayerStream(engine=engine, max_tokens=2, top_logprobs=3).invoke("x", logprobs=True), 3),
        ]:
            content = ask().response_metadata["logprobs"]["content"]
            assert [len(token["top_logprobs"]) for token in content] == [num_top] * 2
        off = ChatLayerStream(engine=engine, max_tokens=2, top_logprobs=3).invoke("x", logprobs=False)
        assert "logprobs" not in off.response_metadata
        text = LayerStreamLLM(engine=engine, max_tokens=2).generate(["x"], logprobs=True, top_logprobs=2)
        assert len(text.generations[0][0].generation_info["logprobs"]["content"]) == 2  # type: ignore[index]


def test_a_prompt_that_is_too_long_is_langchains_error_and_can_be_counted() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm, words = ChatLayerStream(engine=engine), "word " * 5000
        for ask in (
            lambda: llm.invoke(words),
            lambda: list(llm.stream(words)),
            lambda: asyncio.run(llm.ainvoke(words)),
            lambda: LayerStreamLLM(engine=engine).invoke(words),
        ):
            with pytest.raises(ContextOverflowError) as caught:
                ask()
            assert isinstance(caught.value, PromptTooLong)
        assert llm.get_num_tokens_from_messages([HumanMessage(words)]) >= 5000


def test_usage_of_several_answers_is_summed() -> None:
    llm, _ = make()
    for chats in ([[HumanMessage("a")]], [[HumanMessage("a")], [HumanMessage("b")]]):
        output = llm.generate(chats).llm_output
        count = len(chats)
        usage = {"prompt_tokens": 7 * count, "completion_tokens": 4 * count, "total_tokens": 11 * count}
        assert output == {"token_usage": usage, "model_name": "fake"}


def test_terms_of_a_call_reach_the_engine() -> None:
    terms = {"timeout": 1.0, "priority": 3, "client": "bob", "tenant": "acme"}
    for kind in (ChatLayerStream, LayerStreamLLM):
        engine = FakeEngine(has_chat_template=True)
        kind(engine=engine, client="alice").invoke("who?", **terms)
        assert engine.terms == [terms]


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
async def test_passages_are_an_option_of_a_call(kind: type) -> None:
    engine = FakeEngine(has_chat_template=True)
    llm = kind(engine=engine)
    llm.invoke("who?")
    assert "passages" not in engine.terms.pop(), "what that means is the engine's to say"
    for passages in (["a text"], None, ()):
        llm.invoke("who?", passages=passages)
        await llm.ainvoke("who?", passages=passages)
        list(llm.stream("who?", passages=passages))
        assert [chunk async for chunk in llm.astream("who?", passages=passages)]
        llm.bind(passages=passages).invoke("who?")
        llm.batch(["who?", "what?"], passages=passages)
        assert [terms["passages"] for terms in engine.terms] == [passages] * len(engine.terms)
        engine.terms.clear()
    with pytest.raises(ConfigurationError, match="did you mean 'passages'"):
        llm.invoke("who?", passage=["a text"])


INVALID = {"name": "search", "args": '{"query": "x', "id": "1", "error": None, "type": "invalid_tool_call"}
OPENAIS = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"query": "x"}'}}


@pytest.mark.parametrize(
    ("message", "shows"),
    [
        (AIMessage("", invalid_tool_calls=[INVALID]), r'{"invalid": "{\"query\": \"x"}'),  # type: ignore[list-item]
        (AIMessage("", additional_kwargs={"tool_calls": [OPENAIS]}), '{"query": "x"}'),
        (AIMessage([{"type": "tool_use", "id": "1", "name": "search", "input": {"query": "x"}}]), '{"query": "x"}'),
    ],
)
def test_calls_of_a_history_are_kept_in_whatever_form(message: AIMessage, shows: str) -> None:
    llm, engine = make()
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "found"}]}
    for answer in (ToolMessage("found", tool_call_id="1"), HumanMessage([result, {"type": "text", "text": "go on"}])):
        llm.invoke([HumanMessage("find"), message, answer])
    first, second = (batch[0] for batch in engine.batches)
    call = f'<tool_call>\n{{"name": "search", "arguments": {shows}}}\n</tool_call>'
    assert call in first
    assert first.endswith("<|tool|>found<|assistant|>")
    assert second == first.replace("found<|assistant|>", "found<|user|>go on<|assistant|>")


@pytest.mark.parametrize(
    "builtin",
    [
        {"type": "web_search_preview"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "mcp", "server_label": "x"},
        {"type": "bash_20250124", "name": "bash"},
    ],
)
def test_a_providers_own_tool_is_refused(builtin: dict[str, Any]) -> None:
    llm, engine = make()
    for ask in (lambda: llm.bind_tools([search, builtin]).invoke("x"), lambda: llm.invoke("x", tools=[builtin])):
        with pytest.raises(ToolError, match=f"of type '{builtin['type']}' is a provider's own"):
            ask()
    assert engine.batches == []


def test_tools_and_choices_in_anthropics_form_are_understood() -> None:
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    for given in ({"name": "look", "input_schema": schema}, {"type": "custom", "name": "look", "input_schema": schema}):
        for choice in ({"type": "any"}, {"type": "tool", "name": "look"}, "required", {"type": "auto"}):
            llm, engine = make()
            llm.bind_tools([given], tool_choice=choice).invoke("x")  # type: ignore[arg-type]
            grammar = engine.params[0].response_format["grammar"]
            assert ("start: (calls)" in grammar) == (choice != {"type": "auto"})
