"""LangChain's and LangGraph's pipelines, with the chains that their documentation builds."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Annotated, Any, TypedDict

from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_layerstream import add_new_passages, rag_prompt
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, tools_condition

from benchmarks.reuse.setting import Ask, Setting

QUESTION_FIRST = ChatPromptTemplate.from_messages(
    [
        (
            "human",
            "You answer questions. Use the passages that were retrieved; if they do not say it, say that you do not "
            "know. Answer in three sentences at most.\nQuestion: {input} \nContext: {context} \nAnswer:",
        )
    ]
)
"""In the form of the prompt that the hub gives most often: the question, then the context."""

REPHRASE = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "Given the conversation and the latest question, which may refer to it, write a question that can be "
            "understood without the conversation. Do not answer it; return it as it is if nothing is to be changed.",
        ),
        ("placeholder", "{chat_history}"),
        ("human", "{input}"),
    ]
)
AGENT = "You are an assistant. Look passages up with your tool before you answer a question about the institutions."


class Found(BaseRetriever):
    """What a function finds, whatever is asked."""

    find: Callable[[], list[Document]]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.find()


def retrieval_chain(setting: Setting, prompt: ChatPromptTemplate | None = None) -> Ask:
    """``create_retrieval_chain`` around ``create_stuff_documents_chain``."""
    prompt = prompt or rag_prompt()
    order = setting.document_order(prompt)
    retrieve = RunnableLambda(itemgetter("input")) | Found(find=setting.find_documents) | RunnableLambda(order)
    chain = create_retrieval_chain(retrieve, create_stuff_documents_chain(setting.llm, prompt))
    return lambda question: chain.invoke({"input": question})


def question_first(setting: Setting) -> Ask:
    """The same with the question before the context."""
    return retrieval_chain(setting, QUESTION_FIRST)


def history_aware(setting: Setting, turns: int = 5) -> Ask:
    """``create_history_aware_retriever``: the model rewrites the question, then answers. Conversations of *turns*."""
    prompt = rag_prompt(history=True)
    order = setting.document_order(prompt)
    retrieve = Found(find=setting.find_documents) | RunnableLambda(order)
    aware = create_history_aware_retriever(setting.llm, retrieve, REPHRASE)
    chain = create_retrieval_chain(aware, create_stuff_documents_chain(setting.llm, prompt))
    history: list[AnyMessage] = []

    def ask(question: str) -> None:
        if len(history) == 2 * turns:
            history.clear()
        answer = chain.invoke({"input": question, "chat_history": list(history)})["answer"]
        history.extend([HumanMessage(question), AIMessage(answer)])

    return ask


def agent(setting: Setting, turns: int = 1) -> Ask:
    """LangGraph's agent with a retriever for a tool; threads of *turns* questions.

    What it decides is scripted: it looks up every question once, then answers. Its prompts are real, tools and grammar
    included, and so are the tokens that they take.
    """
    tool = create_retriever_tool(
        Found(find=setting.find_documents),
        "look_up",
        "Passages about an institution.",
        response_format="content_and_artifact",
    )
    bound = setting.llm.bind_tools([tool])

    def decide(state: Any) -> dict[str, Any]:
        said = bound.invoke([SystemMessage(AGENT), *state["messages"]])
        last = state["messages"][-1]
        if isinstance(last, HumanMessage):
            call = {"name": "look_up", "args": {"query": last.text}, "id": f"call_{len(state['messages'])}"}
            return {"messages": [AIMessage("", tool_calls=[call])]}
        return {"messages": [AIMessage(said.text)]}

    state = _NewPassages if setting.variant == "growing" else _Messages
    graph = StateGraph(state)  # type: ignore[arg-type]
    graph.add_node("agent", decide)
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", tools_condition)
    graph.add_edge("tools", "agent")
    compiled = graph.compile(InMemorySaver())
    asked = 0

    def ask(question: str) -> None:
        nonlocal asked
        thread: Any = {"configurable": {"thread_id": str(asked // turns)}}
        asked += 1
        compiled.invoke({"messages": [HumanMessage(question)]}, thread)

    return ask


class _Messages(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class _NewPassages(TypedDict):
    messages: Annotated[list[AnyMessage], add_new_passages]
