"""Tools, structured answers, agents, events and token counts of ``LayerStreamLLM`` for LlamaIndex."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from layerstream import LayerStream
from layerstream.errors import ConfigurationError, PromptError, ToolError
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, ThinkingBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.layerstream import LayerStreamLLM
from pydantic import BaseModel, Field, ValidationError

from tests.chat.families import make_turns
from tests.integrations.fake_engine import WORDS, FakeEngine

CALL = [
    "Let me",
    ' see.\n<tool_call>\n{"name": "sea',
    'rch", "argum',
    'ents": {"query": "a',
    'b", "count": 2}}\n',
    "</tool_call>",
]
NATIVE = (
    "complete", "stream_complete", "acomplete", "astream_complete", "chat", "stream_chat", "achat", "astream_chat",
    "structured_predict", "astructured_predict", "stream_structured_predict", "astream_structured_predict",
)  # fmt: skip


def search(query: str, count: int = 3) -> str:
    """Finds documents."""
    return query * count


class Unit(BaseModel):
    """A unit."""

    name: str = Field(max_length=6)
    founded: int = Field(ge=1000, le=2099)


TOOL = FunctionTool.from_defaults(search)
ABOUT = PromptTemplate("Tell me about {what}.")


def make(words: list[str] | None = None, **fields: Any) -> tuple[LayerStreamLLM, FakeEngine]:
    engine = FakeEngine(has_chat_template=True)
    engine.words = words or WORDS
    return LayerStreamLLM(engine=engine, **fields), engine


@pytest.mark.parametrize("name", NATIVE)
def test_every_method_is_its_own(name: str) -> None:
    assert issubclass(LayerStreamLLM, FunctionCallingLLM)
    owner = next(cls for cls in LayerStreamLLM.__mro__ if name in vars(cls))
    assert owner is LayerStreamLLM
    assert "to_thread" not in inspect.getsource(owner)


def test_a_call_is_a_block_and_a_selection() -> None:
    llm, engine = make(CALL)
    response = llm.chat_with_tools([TOOL], user_msg="find")
    (call,) = llm.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("search", {"query": "ab", "count": 2})
    assert response.message.content == "Let me see.\n"
    assert isinstance(response.message.blocks[-1], ToolCallBlock)
    assert '"name": "search"' in engine.batches[0][0]


def test_a_streamed_call_grows() -> None:
    llm, _ = make(CALL)
    responses = list(llm.stream_chat_with_tools([TOOL], user_msg="find"))
    last = responses[-1]
    assert last.message.blocks == llm.chat_with_tools([TOOL], user_msg="find").message.blocks
    assert "".join(response.delta or "" for response in responses) == "Let me see.\n"
    halfway = responses[3].message.blocks[-1]
    assert isinstance(halfway, ToolCallBlock)
    assert halfway.tool_kwargs == '{"query": "a', "text, as long as it is not complete"
    assert llm.get_tool_calls_from_response(responses[3], error_on_no_tool_call=False) == []


def test_predict_and_call_calls() -> None:
    llm, _ = make(CALL)
    assert str(llm.predict_and_call([TOOL], "find")) == "abab"


def test_no_call_is_said() -> None:
    llm, _ = make()
    with pytest.raises(ValueError, match="tool_required=True"):
        llm.get_tool_calls_from_response(llm.chat_with_tools([TOOL], user_msg="find"))


@pytest.mark.parametrize(
    ("options", "forced"),
    [({}, False), ({"tool_required": True}, True), ({"tool_choice": "search"}, True), ({"tool_choice": "none"}, False)],
)
def test_choices_reach_the_grammar(options: dict[str, Any], forced: bool) -> None:
    llm, engine = make()
    llm.chat_with_tools([TOOL], user_msg="find", **options)
    grammar = engine.params[0].response_format["grammar"]
    assert grammar.splitlines()[1] == "start: (calls)" if forced else "answer" in grammar
    assert ("%json" in grammar) == (options.get("tool_choice") != "none")


def test_history_with_calls_goes_back_through_the_template() -> None:
    llm, engine = make()
    call = ToolCallBlock(tool_call_id="1", tool_name="search", tool_kwargs={"query": "x"})
    history = [
        ChatMessage(role="user", content="find"),
        ChatMessage(role="assistant", blocks=[call]),
        ChatMessage(role="tool", content="found", additional_kwargs={"tool_call_id": "1"}),
    ]  # fmt: skip
    llm.chat(history)
    (prompt,) = engine.batches[0]
    assert '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>' in prompt
    assert prompt.endswith("<|tool|>found<|assistant|>")


def test_thoughts_are_a_block() -> None:
    llm, engine = make(["<think>", "hm", "m</think>", "\n\nyes"])
    engine._turns = make_turns("qwen 3")[0]
    message = llm.chat([ChatMessage(content="who?")]).message
    assert message.content == "yes"
    assert isinstance(message.blocks[0], ThinkingBlock)
    assert message.blocks[0].content == "hmm"
    assert "".join(r.delta for r in llm.stream_chat([ChatMessage(content="who?")])) == "yes"  # type: ignore[misc]


async def test_a_completion_is_what_its_stream_adds_up_to() -> None:
    llm, engine = make(["<think>", "hm", "m</think>", "\n\nyes"])
    engine._turns = make_turns("qwen 3")[0]
    streamed = "".join(piece.delta or "" for piece in llm.stream_complete("who?"))
    assert llm.complete("who?").text == (await llm.acomplete("who?")).text == streamed == "yes"


async def test_a_function_agent_calls_its_tool_and_answers() -> None:
    said = iter([CALL, ["It is", " abab."]])

    class Agents(FakeEngine):
        def submit_many(self, *arguments: Any, **terms: Any) -> Any:
            self.words = next(said)
            return super().submit_many(*arguments, **terms)

    engine = Agents(has_chat_template=True)
    agent = FunctionAgent(tools=[TOOL], llm=LayerStreamLLM(engine=engine), streaming=True)
    assert str(await agent.run("find ab twice")) == "It is abab."
    assert "abab" in engine.batches[1][0], "the tool's answer went back to the model"


async def test_structured_answers_of_a_model_that_babbles() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_new_tokens=60)
        unit = llm.structured_predict(Unit, ABOUT, what="Brenvik")
        assert isinstance(unit, Unit)
        assert await llm.astructured_predict(Unit, ABOUT, what="Brenvik") == unit
        assert list(llm.stream_structured_predict(Unit, ABOUT, what="Brenvik"))[-1] == unit
        partials = [part async for part in await llm.astream_structured_predict(Unit, ABOUT, what="Brenvik")]
        assert partials[-1] == unit
        assert len(partials) > 2
        structured = llm.as_structured_llm(Unit)
        assert structured.chat([ChatMessage(content="Tell me about Brenvik.")]).raw == unit
        called = LayerStreamLLM(
            engine=engine, max_new_tokens=60, pydantic_program_mode=PydanticProgramMode.FUNCTION
        ).structured_predict(Unit, ABOUT, what="Brenvik")
        assert isinstance(called, Unit)


def test_a_structured_prompt_has_the_system_prompt_and_says_the_schema_last() -> None:
    llm, engine = make(['{"name": "x", "founded": 1921}'], system_prompt="Be brief.")
    assert llm.structured_predict(Unit, ABOUT, what="Brenvik").founded == 1921
    (prompt,) = engine.batches[0]
    assert prompt.startswith("<s><|system|>Be brief.<|user|>Tell me about Brenvik.")
    assert '"founded"' in prompt
    llm.structured_predict(Unit, ABOUT, llm_kwargs={"explain_schema": False, "temperature": 0.3}, what="Brenvik")
    assert engine.batches[1][0] == "<s><|system|>Be brief.<|user|>Tell me about Brenvik.<|assistant|>"
    assert engine.params[1].temperature == 0.3


def test_an_answer_that_was_cut_off_says_so() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_new_tokens=4)
        with pytest.raises(ValueError, match="max_new_tokens"):
            llm.structured_predict(Unit, ABOUT, what="Brenvik")


def test_events_are_sent_and_tokens_counted() -> None:
    class Listener(BaseEventHandler):
        seen: list[str] = Field(default_factory=list)

        @classmethod
        def class_name(cls) -> str:
            return "Listener"

        def handle(self, event: Any, **_: Any) -> None:
            self.seen.append(event.class_name())

    listener, dispatcher = Listener(), get_dispatcher()
    dispatcher.add_event_handler(listener)
    try:
        counter = TokenCountingHandler()
        llm, _ = make(['{"name": "x", "founded": 1921}'], callback_manager=CallbackManager([counter]))
        llm.structured_predict(Unit, ABOUT, what="Brenvik")
    finally:
        dispatcher.event_handlers.remove(listener)
    assert counter.prompt_llm_token_count == 7
    assert counter.completion_llm_token_count == 1
    for event in (
        "LLMStructuredPredictStartEvent",
        "LLMChatStartEvent",
        "LLMChatEndEvent",
        "LLMStructuredPredictEndEvent",
    ):
        assert event in listener.seen


async def test_five_gathered_completions_share_their_sweeps() -> None:
    with LayerStream("demo", kv_store=None, progress=False, speculation="off") as engine:
        llm = LayerStreamLLM(engine=engine, max_new_tokens=6)
        before = engine.stats().sweeps
        await llm.acomplete("Who leads Brenvik?")
        alone = engine.stats().sweeps - before
        before = engine.stats().sweeps
        await asyncio.gather(*(llm.acomplete(f"Who leads unit {number}?") for number in range(5)))
        assert engine.stats().sweeps - before <= alone + 2


def test_ones_own_way_of_writing_prompts_is_kept() -> None:
    llm, engine = make(
        messages_to_prompt=lambda messages: f"own:{messages[0].content}", completion_to_prompt="own {}".format
    )
    llm.chat([ChatMessage(content="a")])
    llm.complete("b")
    assert engine.batches == [["own:a"], ["own b"]]


def test_tools_on_a_model_that_cannot() -> None:
    for engine, fields, says in [
        (FakeEngine(), {}, "it has none"),
        (FakeEngine(has_chat_template=True), {"messages_to_prompt": str}, "messages_to_prompt"),
    ]:
        llm = LayerStreamLLM(engine=engine, **fields)
        assert not llm.metadata.is_function_calling_model
        with pytest.raises(ToolError, match=says):
            llm.chat_with_tools([TOOL], user_msg="find")


def test_one_engine_is_shared_and_its_options_kept() -> None:
    first, second = (LayerStreamLLM(model="demo", engine_kwargs={"kv_store": None}) for _ in range(2))
    assert first._handle.get() is second._handle.get()
    assert (
        first._handle.get()
        is not LayerStreamLLM(model="demo", engine_kwargs={"kv_store": None, "max_context": 512})._handle.get()
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"memory": "3GiB"}, "engine_kwargs"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": 3}, "stop"),
    ],
)
def test_a_wrong_field_says_what_to_do(fields: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigurationError, ValidationError), match=says):
        LayerStreamLLM(**fields)


def test_a_wrong_call_says_what_to_do() -> None:
    llm, engine = make()
    picture = ChatMessage(role=MessageRole.USER, blocks=[ImageBlock(url="http://x/y.png")])
    for call, error, says in [
        (lambda: llm.complete("x", temprature=1), ConfigurationError, "did you mean 'temperature'"),
        (lambda: llm.chat([picture]), PromptError, "'image'"),
        (lambda: llm.chat_with_tools([TOOL], user_msg="x", tool_choice="find"), ToolError, "there: search"),
        (lambda: llm.complete("x", stop=3), ValueError, "stop"),
    ]:
        with pytest.raises(error, match=says):
            call()
    assert engine.batches == []


def test_log_probabilities_are_in_the_responses() -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
        asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
        chat = [ChatMessage(content="x")]
        for response in (
            llm.chat(chat, **asked),
            list(llm.stream_chat(chat, **asked))[-1],
            llm.complete("x", **asked),
            list(llm.stream_complete("x", **asked))[-1],
            LayerStreamLLM(engine=engine, max_new_tokens=2, top_logprobs=3).chat(chat),
        ):
            assert [len(best) for best in response.logprobs or []] == [3, 3]
            assert (response.logprobs or [])[0][0].logprob <= 0
            assert len(response.raw["logprobs"]["content"]) == 2
        (alone,), _ = llm.chat(chat, logprobs=True).logprobs or []
        assert alone.token == engine.tokenizer.decode(llm.tokenize(alone.token))
        assert llm.chat(chat).logprobs is None


def test_terms_of_a_call_reach_the_engine() -> None:
    llm, engine = make(client="alice", priority=1)
    llm.complete("x")
    llm.complete("x", client="bob", priority=3, timeout=1.0, tenant="acme")
    assert engine.terms == [
        {"timeout": None, "priority": 1, "client": "alice", "tenant": ""},
        {"timeout": 1.0, "priority": 3, "client": "bob", "tenant": "acme"},
    ]


async def test_passages_are_an_option_of_a_call() -> None:
    llm, engine = make()
    llm.complete("x")
    assert "passages" not in engine.terms.pop(), "what that means is the engine's to say"
    chat = [ChatMessage(role="user", content="x")]
    for passages in (["a text"], None, ()):
        llm.complete("x", passages=passages)
        await llm.acomplete("x", passages=passages)
        list(llm.stream_complete("x", passages=passages))
        llm.chat(chat, passages=passages)
        await llm.achat(chat, passages=passages)
        list(llm.stream_chat(chat, passages=passages))
        assert [terms["passages"] for terms in engine.terms] == [passages] * 6
        engine.terms.clear()
    with pytest.raises(ConfigurationError, match="did you mean 'passages'"):
        llm.complete("x", passage=["a text"])


OPENAIS = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"query": "x"}'}}


@pytest.mark.parametrize(
    ("message", "shows"),
    [
        (
            ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="search", tool_kwargs='{"query": "x')]),
            r'{"invalid": "{\"query\": \"x"}',
        ),
        (ChatMessage(role="assistant", additional_kwargs={"tool_calls": [OPENAIS]}), '{"query": "x"}'),
    ],
)
def test_calls_of_a_history_are_kept_in_whatever_form(message: ChatMessage, shows: str) -> None:
    llm, engine = make()
    llm.chat([ChatMessage(content="find"), message, ChatMessage(role="tool", content="found")])
    assert f'<tool_call>\n{{"name": "search", "arguments": {shows}}}\n</tool_call>' in engine.batches[0][0]
