"""Passages come in behind those that are there: a chat's documents, an agent's messages, in LangGraph's own loops."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_layerstream import ChatLayerStream, add_new_passages, grow_context, rag_prompt
from langchain_layerstream.conversations import NOTHING_NEW
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
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


def test_a_retrievers_result_has_what_is_new_in_an_order_of_its_own() -> None:
    agent = make_agent(make_tool(response_format="content_and_artifact"))
    assert results(agent, "ba", "dcab", "ab") == ["aaa\n\nbbb", "ccc\n\nddd", NOTHING_NEW]


def test_what_has_no_documents_is_as_it_was() -> None:
    assert results(make_agent(make_tool()), "ba", "ab") == ["bbb\n\naaa", "aaa\n\nbbb"]


def test_a_result_that_is_said_again_keeps_its_passages() -> None:
    result = ToolMessage("x", tool_call_id="1", id="r", artifact=found("ba"))
    messages = add_new_passages([HumanMessage("q", id="q")], result)
    again = add_new_passages(messages, [result])
    assert [message.content for message in again] == ["q", "aaa\n\nbbb"]


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
    assert shown == ["aaa\n\nbbb", "ccc"]
