"""Passages come in behind those that are there: a chat's documents, an agent's messages, in LangGraph's own loops."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage, RemoveMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_layerstream import ChatLayerStream, add_new_passages, grow_context, rag_prompt
from langchain_layerstream.conversations import NOTHING_NEW
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES, add_messages
from langgraph.prebuilt import ToolNode, tools_condition
from typing_extensions import TypedDict

from tests.integrations.fake_engine import FakeEngine

THREAD: Any = {"configurable": {"thread_id": "1"}}


def document(letter: str) -> Document:
    return Document(letter * 3, metadata={"source": letter})


def found(question: str) -> list[Document]:
    """A document for each letter, in the order of the letters."""
    return [document(letter) for letter in question]


class Chat(TypedDict):
    context: Annotated[list[Document], partial(grow_context, most=4)]
    messages: Annotated[list[AnyMessage], add_messages]


def test_a_chats_context_grows_at_its_end() -> None:
    engine = FakeEngine(has_chat_template=True)
    llm = ChatLayerStream(engine=engine)

    def answer(state: Chat) -> dict[str, Any]:
        *history, question = state["messages"]
        context = "\n\n".join(document.page_content for document in state["context"])
        asked = {"context": context, "chat_history": history, "input": question.content}
        return {"messages": [(rag_prompt(history=True) | llm).invoke(asked)]}

    graph = StateGraph(Chat)
    graph.add_node("retrieve", lambda state: {"context": found(state["messages"][-1].content)})
    graph.add_node("answer", answer)
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", "answer")
    chat = graph.compile(InMemorySaver())
    contexts = []
    for question in ("ba", "ac", "cb", "de"):
        chat.invoke({"messages": [HumanMessage(question)]}, THREAD)
        contexts.append([d.metadata["source"] for d in chat.get_state(THREAD).values["context"]])
    assert contexts == [["b", "a"], ["b", "a", "c"], ["b", "a", "c"], ["d", "e"]], "five are too many"
    prompts = [batch[0] for batch in engine.batches]
    assert "bbb\n\naaa\n\nccc" in str(prompts[1])
    assert str(prompts[2])[: str(prompts[2]).index("ccc")] == str(prompts[1])[: str(prompts[1]).index("ccc")]


def make_tool(**options: Any) -> Any:
    return create_retriever_tool(RunnableLambda(found), "search", "Finds.", **options)  # type: ignore[arg-type]


class Agent(TypedDict):
    messages: Annotated[list[AnyMessage], add_new_passages]


def make_agent(tool: Any) -> Any:
    """Calls the tool with what the user says, then answers."""

    def decide(state: Agent) -> dict[str, Any]:
        last = state["messages"][-1]
        if not isinstance(last, HumanMessage):
            return {"messages": [AIMessage("done")]}
        return {"messages": AIMessage("", tool_calls=[{"name": "search", "args": {"query": last.content}, "id": "1"}])}

    graph = StateGraph(Agent)
    graph.add_node("agent", decide)
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    return graph.compile(InMemorySaver())


def results(agent: Any, *questions: str) -> list[str]:
    for question in questions:
        agent.invoke({"messages": [HumanMessage(question)]}, THREAD)
    messages = agent.get_state(THREAD).values["messages"]
    return [message.content for message in messages if isinstance(message, ToolMessage)]


def test_a_retrievers_result_has_what_is_new() -> None:
    agent = make_agent(make_tool(response_format="content_and_artifact"))
    assert results(agent, "ba", "dcab", "ab", "e") == ["bbb\n\naaa", "ddd\n\nccc", NOTHING_NEW, "eee"]


def test_what_has_no_documents_is_as_it_was() -> None:
    assert results(make_agent(make_tool()), "ba", "ab") == ["bbb\n\naaa", "aaa\n\nbbb"]


def result(number: int, letters: str, **fields: Any) -> ToolMessage:
    """What a retriever's tool returns."""
    texts = [document.page_content for document in found(letters)]
    fields = {"content": "\n\n".join(texts), "id": f"r{number}", "artifact": found(letters), **fields}
    return ToolMessage(tool_call_id=str(number), **fields)


def contents(messages: list[Any]) -> list[Any]:
    return [message.content for message in messages]


def test_a_result_that_is_said_again_keeps_its_passages() -> None:
    messages = add_new_passages([HumanMessage("q", id="q")], result(1, "ba"))
    again = add_new_passages(messages, [result(1, "ba")])
    assert contents(again) == ["q", "bbb\n\naaa"]


def test_what_was_removed_comes_again() -> None:
    messages = add_new_passages([], [result(1, "ab"), result(2, "bc")])
    assert contents(messages) == ["aaa\n\nbbb", "ccc"]
    assert contents(add_new_passages(messages, [RemoveMessage(id="r1"), result(3, "abc")])) == ["ccc", "aaa\n\nbbb"]
    gone = RemoveMessage(id=REMOVE_ALL_MESSAGES)
    assert contents(add_new_passages(messages, [result(3, "a"), gone, result(4, "abc")])) == ["aaa\n\nbbb\n\nccc"]
    with pytest.raises(ValueError, match="doesn't exist"):
        add_new_passages(messages, RemoveMessage(id="unknown"))
    with pytest.raises(ValueError, match="non-null"):
        add_new_passages(messages, None)
    cleared = [result(1, "ab", content="[cleared]"), result(2, "bc", content="[cleared]")]
    assert contents(add_new_passages(cleared, result(3, "ab")))[-1] == "aaa\n\nbbb", "it is not there to be read"


def test_content_of_blocks_and_documents_of_a_checkpoint() -> None:
    picture = {"type": "image", "url": "https://example.org/a.png"}
    blocks = [{"type": "text", "text": "aaa\n\nbbb", "id": "1"}, picture, "ccc", {"type": "text", "text": "ddd"}]
    dicts: list[Any] = [document.model_dump() for document in found("abcd")]
    old = add_new_passages([], result(1, "ac", artifact=dicts[::2]))
    message = add_new_passages(old, result(2, "abcd", content=blocks, artifact=[*dicts, "score"]))[-1]
    assert message.content == [{"type": "text", "text": "bbb", "id": "1"}, picture, {"type": "text", "text": "ddd"}]
    assert message.artifact == [dicts[1], dicts[3], "score"]
    assert (message.id, message.tool_call_id) == ("r2", "2")
    last = add_new_passages(old, result(2, "ac", content=["aaa", "ccc"]))[-1]
    assert last.content == [{"type": "text", "text": NOTHING_NEW}]


def test_what_a_document_prompt_writes_goes_along() -> None:
    documents = found("abc")
    written = "\n\n".join(f"From {d.metadata['source']}:\n{d.page_content}" for d in documents)
    messages = add_new_passages([result(1, "b")], result(2, "abc", content=written))
    assert messages[-1].content == "From a:\naaa\n\nFrom c:\nccc"
    told = result(2, "abc", content="a summary")
    assert add_new_passages([result(1, "b")], told) == [result(1, "b"), told], "it does not say them"


NUMBERS = st.integers(0, 5)
WITHOUT_PASSAGES = st.one_of(
    st.builds(lambda n: HumanMessage("hello", id=f"h{n}"), NUMBERS),
    st.builds(lambda n: AIMessage([{"type": "text", "text": "hi"}], id=f"a{n}"), NUMBERS),
    st.builds(lambda n: ToolMessage("1\n\n1", tool_call_id="1", id=f"t{n}"), NUMBERS),
    st.builds(lambda n: ToolMessage("1", tool_call_id="1", id=f"t{n}", artifact=[1, {"type": "x"}]), NUMBERS),
    st.builds(lambda n: AIMessageChunk("piece", id=f"c{n}"), NUMBERS),
    st.just(("user", "a pair")),
    st.just({"role": "user", "content": "a dict", "id": "d"}),
)
REMOVED = st.one_of(
    st.builds(lambda kind, n: RemoveMessage(id=f"{kind}{n}"), st.sampled_from("hatc"), NUMBERS),
    st.just(RemoveMessage(id=REMOVE_ALL_MESSAGES)),
)
UPDATES = st.lists(st.lists(WITHOUT_PASSAGES | REMOVED, max_size=5) | WITHOUT_PASSAGES, max_size=6)


@given(UPDATES, st.data())
def test_where_nothing_is_repeated_it_is_add_messages(updates: list[Any], data: st.DataObject) -> None:
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    state: list[Any] = []
    for update in updates:
        if isinstance(update, list):
            some = [next(letters) for _ in range(data.draw(st.integers(0, 3)))]
            update = [*update, result(data.draw(NUMBERS), "".join(some))]
        try:
            expected: list[Any] = add_messages(list(state), copy.deepcopy(update))  # type: ignore[assignment]
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                add_new_passages(state, update)
            continue
        state = add_new_passages(state, update)
        assert [_plain(message) for message in state] == [_plain(message) for message in expected]


@given(st.lists(st.lists(st.builds(result, NUMBERS, st.text("abcd", max_size=4)), max_size=3), max_size=6))
def test_every_passage_is_shown_once(updates: list[list[ToolMessage]]) -> None:
    state: list[Any] = []
    for update in updates:
        expected: list[Any] = add_messages(list(state), copy.deepcopy(update))  # type: ignore[assignment, arg-type]
        state = add_new_passages(state, update)
        assert [message.id for message in state] == [message.id for message in expected]
        shown = [letters for message in state for letters in message.content.split("\n\n") if letters != NOTHING_NEW]
        shown = [letters for letters in shown if letters]
        assert len(shown) == len(set(shown))
        brought = {document.page_content for message in expected for document in message.artifact}
        assert set(shown) == brought, "as LangGraph's own would have it in the conversation"


def _plain(message: Any) -> dict[str, Any]:
    """What a message says; new ids are drawn."""
    plain = message.model_dump()
    return {**plain, "id": plain["id"] if len(plain["id"] or "") < 20 else "drawn"}


@pytest.mark.parametrize("is_async", [False, True])
async def test_create_agent_takes_the_reducer_in_its_state(is_async: bool) -> None:
    agents = pytest.importorskip("langchain.agents")

    class State(agents.AgentState):
        messages: Annotated[list[AnyMessage], add_new_passages]

    engine = FakeEngine(has_chat_template=True)
    agent = agents.create_agent(
        ChatLayerStream(engine=engine),
        [make_tool(response_format="content_and_artifact")],
        state_schema=State,
        checkpointer=InMemorySaver(),
    )
    call = ['<tool_call>\n{"name": "search", "arguments": {"query": "%s"}}\n</tool_call>']
    shown: list[str] = []
    for query in ("ba", "abc"):
        said = iter([[call[0] % query], ["done"]])
        release = engine.release

        def answer(request: Any, said: Any = said, release: Any = release) -> None:
            engine.words = next(said)
            release(request)

        engine.release = answer  # type: ignore[method-assign]
        asked = {"messages": [HumanMessage(query)]}
        state = await agent.ainvoke(asked, THREAD) if is_async else agent.invoke(asked, THREAD)
        engine.release = release  # type: ignore[method-assign]
        shown = [message.content for message in state["messages"] if isinstance(message, ToolMessage)]
    assert shown == ["bbb\n\naaa", "ccc"]
