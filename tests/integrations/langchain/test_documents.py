"""Contexts come before questions, in the order that is stored, computed when documents enter the index."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_layerstream import ChatLayerStream, LayerStreamLLM, StablePrefixOrder, WarmPrefixes, rag_prompt
from layerstream import ConfigurationError, KVStoreConfig, LayerStream

FACTS = ["is led by Sluba Merkast", "was founded in 1921", "is located in Tredry", "makes the Dwefebix lens"]


def documents(count: int = 4) -> list[Document]:
    names = ["Brenvik", "Gukrand", "Jaskeld", "Vanorth", "Hovesk", "Stirwen"]
    return [
        Document(
            "\n".join(f"{name} {fact} and stands in row {row}." for row in range(3) for fact in FACTS),
            metadata={"source": f"{name}.md"},
        )
        for name in names[:count]
    ]


@pytest.fixture
def engine(tmp_path: Path):
    with LayerStream(
        "demo", kv_store=KVStoreConfig(tmp_path, load="always"), progress=False, chunk_tokens=32
    ) as engine:
        yield engine


def test_without_a_model_the_order_is_canonical() -> None:
    given = documents()
    chunks = [Document("b", metadata={"source": "x", "start_index": 9}), Document("a", metadata={"source": "x"})]
    assert StablePrefixOrder().invoke(given[::-1]) == sorted(given, key=lambda d: d.metadata["source"])
    assert [d.page_content for d in StablePrefixOrder().invoke(chunks)] == ["a", "b"]


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
def test_what_was_asked_about_before_comes_first_again(kind: type, engine: LayerStream) -> None:
    llm, prompt = kind(engine=engine, max_tokens=2), rag_prompt()
    order = StablePrefixOrder(llm=llm, prompt=prompt)
    answer = create_stuff_documents_chain(llm, prompt)
    third, first, fourth, second = (documents()[at] for at in (2, 0, 3, 1))
    answer.invoke({"context": [third, first], "input": "Who leads Jaskeld?"})
    engine._open_store().flush()
    assert order.invoke([first, second, third]) == [third, first, second]
    assert order.invoke([second, fourth]) == sorted([second, fourth], key=lambda d: d.metadata["source"])
    reused = engine.stats().kv.reused_tokens
    answer.invoke({"context": order.invoke([first, second, third]), "input": "Who leads Gukrand?"})
    assert engine.stats().kv.reused_tokens > reused + 200


def test_a_retrieval_chain_reuses_what_the_retriever_shuffles(engine: LayerStream) -> None:
    llm, prompt, draw = ChatLayerStream(engine=engine, max_tokens=2), rag_prompt(), random.Random(3)

    def retrieve(question: str) -> list[Document]:
        return draw.sample(documents(), 4)

    order = StablePrefixOrder(llm=llm, prompt=prompt)
    reuse = {}
    for name, retriever in (("as found", RunnableLambda(retrieve)), ("ordered", RunnableLambda(retrieve) | order)):
        chain = create_retrieval_chain(
            RunnableLambda(lambda inputs: inputs["input"]) | retriever, create_stuff_documents_chain(llm, prompt)
        )
        cached = []
        for number in range(4):
            messages = prompt.format_messages(
                context="\n\n".join(d.page_content for d in retriever.invoke("x")), input=f"Question {number}?"
            )
            cached.append(engine.cached_tokens(llm.prompt_for(messages)))
            chain.invoke({"input": f"Question {number}?"})
            engine._open_store().flush()
        reuse[name] = cached
    assert min(reuse["ordered"][1:]) > 300, "all but the first question find nearly the whole context"


def test_documents_that_were_warmed_are_there_for_the_first_question(engine: LayerStream) -> None:
    llm, prompt = ChatLayerStream(engine=engine, max_tokens=2), rag_prompt(history=True)
    given = documents()
    assert WarmPrefixes(llm=llm, prompt=prompt).transform_documents(given) == given
    computed = engine.stats().kv.written_pages
    message = (prompt | llm).invoke({"context": given[1].page_content, "input": "Who leads Gukrand?"})
    assert message.usage_metadata["input_token_details"]["cache_read"] >= 96  # type: ignore[index]
    WarmPrefixes(llm=llm, prompt=prompt).transform_documents(given)
    assert engine.stats().kv.written_pages <= computed + 8, "again costs nothing"


def test_a_text_prompt_of_ones_own(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_tokens=2, chat_template=False)
    prompt = PromptTemplate.from_template("Context:\n{docs}\n\nQuestion: {question}\nAnswer:")
    shape = {"llm": llm, "prompt": prompt, "document_variable_name": "docs"}
    WarmPrefixes(**shape).transform_documents(documents()[2:3])
    assert StablePrefixOrder(**shape).invoke(documents())[0] == documents()[2]


def test_what_cannot_work_says_why(engine: LayerStream) -> None:
    llm = ChatLayerStream(engine=engine, max_tokens=2)
    question_first = ChatPromptTemplate.from_template("{input}\n\n{context}")
    with pytest.raises(ConfigurationError, match="question before the context"):
        WarmPrefixes(llm=llm, prompt=question_first).transform_documents(documents())
    with pytest.raises(ValueError, match="only they know their KV"):
        StablePrefixOrder(llm="gpt")
    with (
        LayerStream("demo", kv_store=None, progress=False) as bare,
        pytest.raises(ConfigurationError, match="kv_store"),
    ):
        WarmPrefixes(llm=ChatLayerStream(engine=bare)).transform_documents(documents())


def test_history_stands_between_context_and_question() -> None:
    prompt, given = rag_prompt(history=True), {"context": "C", "input": "Q"}
    messages = prompt.invoke({**given, "chat_history": [("human", "a"), ("ai", "b")]}).to_messages()
    assert [message.type for message in messages] == ["system", "human", "ai", "human"]
    assert messages[0].text.endswith("C")
    assert [message.type for message in prompt.invoke(given).to_messages()] == ["system", "human"]


def test_what_many_questions_bring_comes_first(engine: LayerStream) -> None:
    """The order is learned while the store knows no context with it, and kept by a store that outlives the engine."""
    llm, prompt = ChatLayerStream(engine=engine, max_tokens=2), rag_prompt()
    first, second, third, popular = documents()
    order = StablePrefixOrder(llm=llm, prompt=prompt)
    for other in (first, second, third):
        order.invoke([other, popular])
    assert order.invoke([first, second, popular])[0] == popular
    assert StablePrefixOrder(llm=llm, prompt=prompt, learn=False).invoke([first, popular]) == [first, popular]
    assert engine.popularity([popular.page_content])[0] == pytest.approx(4, abs=0.1)
    create_stuff_documents_chain(llm, prompt).invoke({"context": [second, popular], "input": "Who?"})
    engine._open_store().flush()
    assert order.invoke([popular, second, first]) == [second, popular, first], "what is stored is followed"
