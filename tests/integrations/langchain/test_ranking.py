"""Embeddings, reranker, citations and terms with LangChain's own retrievers and chains."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_layerstream import (
    ChatLayerStream,
    LayerStreamEmbeddings,
    LayerStreamLLM,
    LayerStreamReranker,
    StablePrefixOrder,
    cited_documents_chain,
    rag_prompt,
)
from layerstream import ConfigurationError, LayerStream
from layerstream.ranking.embedder import Embedder
from layerstream.ranking.forms import RerankForm
from layerstream.text.passages import SEEN

from tests.integrations.fake_engine import FakeEngine

TEXTS = [f"Passage {number}: the keeper of light {number} is away. " * 2 for number in range(4)]
DOCUMENTS = [Document(text, metadata={"source": str(number)}) for number, text in enumerate(TEXTS)]
FORM = RerankForm(pieces=("A: {query}", "\n", "B: {passage}", "\n", "Good?"), tokens=("y", "n"))


class _Fixed(BaseRetriever):
    def _get_relevant_documents(self, query: str, *, run_manager: object) -> list[Document]:
        return list(DOCUMENTS)


@pytest.fixture(scope="module")
def engine(babbler: str) -> Iterator[LayerStream]:
    with LayerStream(babbler, dtype="float32", kv_store=None, progress=False) as engine:
        yield engine


def test_a_vector_store_finds_what_it_was_given(engine: LayerStream) -> None:
    embeddings = LayerStreamEmbeddings(engine=engine, instruction="")
    store = InMemoryVectorStore.from_documents(DOCUMENTS, embeddings)
    assert store.similarity_search(TEXTS[2], k=1)[0].metadata["source"] == "2"
    vectors = embeddings.embed_documents(TEXTS)
    assert vectors == asyncio.run(embeddings.aembed_documents(TEXTS))
    assert np.array_equal(np.array(vectors, dtype=np.float32), Embedder(engine).documents(TEXTS))
    assert embeddings.embed_documents([]) == []
    asking = LayerStreamEmbeddings(engine=engine)
    assert asking.embed_query("Who?") != embeddings.embed_query("Who?")
    assert asking.embed_query("Who?") == asyncio.run(asking.aembed_query("Who?"))


def test_a_retriever_reranks(engine: LayerStream) -> None:
    from langchain_classic.retrievers import ContextualCompressionRetriever

    reranker = LayerStreamReranker(engine=engine, form=FORM, top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=_Fixed())
    found = retriever.invoke("Who keeps light 2?")
    scores = [document.metadata["relevance_score"] for document in found]
    assert len(found) == 2
    assert scores == sorted(scores, reverse=True)
    assert found == asyncio.run(retriever.ainvoke("Who keeps light 2?"))
    assert "relevance_score" not in DOCUMENTS[0].metadata
    assert reranker.compress_documents([], "Who?") == []
    assert not LayerStreamReranker(engine=engine, form=FORM, min_score=1.0).compress_documents(DOCUMENTS, "Who?")


def test_unknown_fields_are_named() -> None:
    with pytest.raises((ConfigurationError, ValueError), match="poling"):
        LayerStreamEmbeddings(poling="mean")


def test_one_engine_answers_and_ranks(engine: LayerStream) -> None:
    llm = ChatLayerStream(engine=engine, max_tokens=2)
    assert LayerStreamReranker(engine=engine, form=FORM).load() is llm.load()


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
def test_terms_come_from_the_config(kind: type, engine: LayerStream) -> None:
    llm = kind(engine=engine, max_tokens=1)
    configured = {"configurable": {"tenant": "acme", "client": f"a-{kind.__name__}", "thread_id": "7"}}
    question = f"Who keeps it, and of which light? ({kind.__name__}) " * 6

    def count() -> int:
        found = engine.stats().clients.get(f"a-{kind.__name__}")
        return 0 if found is None else found.requests

    llm.invoke(question, configured)
    assert count() == 1
    llm.with_config(configurable=configured["configurable"]).invoke(question)
    (ChatPromptTemplate.from_messages([("human", "{q}")]) | llm).invoke({"q": question}, configured)
    list(llm.stream(question, configured))
    asyncio.run(llm.ainvoke(question, configured))
    llm.batch([question, question], configured)
    assert count() == 7
    assert engine.stats().clients[f"a-{kind.__name__}"].cached_tokens > 0
    prompt = llm.prompt_for(question) if kind is LayerStreamLLM else None
    if prompt is not None:
        assert engine.cached_tokens(prompt, tenant="acme") > 0
        assert engine.cached_tokens(prompt) == 0


def test_fields_are_configurable(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_tokens=1).configurable_fields(client=ConfigurableField(id="client"))
    llm.with_config(configurable={"client": "field"}).invoke("Who?")
    assert engine.stats().clients["field"].requests == 1


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
async def test_none_in_a_config_is_as_the_wrapper_was_made(kind: type) -> None:
    own = {"timeout": 3.0, "priority": 2, "client": "alice", "tenant": "acme"}
    fake = FakeEngine(has_chat_template=True)
    llm = kind(engine=fake, **own)
    config: Any = {"configurable": {**dict.fromkeys(own), "thread_id": "7", "other": None}}
    llm.invoke("Who?", config)
    await llm.ainvoke("Who?", config)
    list(llm.stream("Who?", config))
    llm.batch(["Who?", "What?"], config)
    await llm.abatch(["Who?"], [config])
    assert fake.terms == [own] * len(fake.terms)
    fake.terms.clear()
    llm.invoke("Who?", {"configurable": {"tenant": "", "priority": 0, "client": None}})
    assert fake.terms == [{**own, "tenant": "", "priority": 0}]


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
@pytest.mark.parametrize("key", ["layerstream_tenant", "layerstream_tennant", "LayerStream_Priority"])
async def test_a_term_by_another_name_is_refused(kind: type, key: str) -> None:
    fake = FakeEngine(has_chat_template=True)
    llm, config = kind(engine=fake), {"configurable": {key: 1}}
    name = "priority" if "rior" in key else "tenant"
    calls = (
        lambda: llm.invoke("Who?", config),
        lambda: asyncio.run(llm.ainvoke("Who?", config)),
        lambda: list(llm.stream("Who?", config)),
        lambda: llm.batch(["Who?", "What?"], config),
        lambda: (RunnableLambda(str) | llm).invoke("Who?", config),
        lambda: StablePrefixOrder(llm=llm).invoke([Document("a")], config),
    )
    for call in calls:
        with pytest.raises(ConfigurationError, match=rf"'{key}'.* called '{name}', and there are 'timeout'"):
            await asyncio.to_thread(call)
    assert not fake.batches


def test_other_libraries_entries_are_theirs(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeEngine()
    llm = LayerStreamLLM(engine=fake)
    llm.invoke("Who?", {"configurable": {"thread_id": "1", "tenant_id": "x", "session": object(), "clients": 3}})
    assert not caplog.records
    for _ in range(2):
        llm.invoke("Who?", {"configurable": {"layerstream_temperature": 0.5}})
    (record,) = caplog.records
    assert "'layerstream_temperature', which has no effect; there are 'timeout', 'priority'" in record.getMessage()
    named = LayerStreamLLM(engine=fake).configurable_fields(
        tenant=ConfigurableField(id="layerstream_tenant"), top_k=ConfigurableField(id="layerstream_top_k")
    )
    named.invoke("Who?", {"configurable": {"layerstream_tenant": "acme", "layerstream_top_k": 3}})
    assert fake.terms[-1]["tenant"] == "acme"
    assert fake.params[-1].top_k == 3
    assert len(caplog.records) == 1


def test_what_a_chain_retrieves_is_noted_for_its_tenant() -> None:
    fake = FakeEngine(has_chat_template=True)
    fake.reuses_anywhere = True
    chain = {"context": _Fixed(), "input": RunnablePassthrough()} | rag_prompt() | ChatLayerStream(engine=fake)
    for tenant in (None, "retrieving"):
        chain.invoke("Who?", {"configurable": {"tenant": tenant}})
        asyncio.run(chain.ainvoke("Who?", {"configurable": {"tenant": tenant}}))
        assert SEEN.within(TEXTS, tenant or "") == [text.strip() for text in TEXTS]
    assert not SEEN.within(TEXTS, "another")


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
@pytest.mark.parametrize("anywhere", [False, True])
def test_numbered_documents_are_passages_as_they_stand(kind: type, anywhere: bool) -> None:
    fake = FakeEngine(has_chat_template=True)
    fake.reuses_anywhere = anywhere
    own, configured = (f"{which} {kind.__name__} {anywhere}" for which in ("own", "configured"))
    chain = cited_documents_chain(
        kind(engine=fake, tenant=own), document_prompt=PromptTemplate.from_template("From {source}:\n{page_content}")
    )
    document = Document("As [7] says, the keeper is away.", metadata={"source": "a.md"})
    asked: Any = {"context": [document], "input": "Who?"}
    chain.invoke(asked)
    asyncio.run(chain.ainvoke(asked, {"configurable": {"tenant": configured}}))
    text = "From a.md:\nAs (7) says, the keeper is away."
    for (prompt,), tenant in zip(fake.batches, (own, configured), strict=True):
        assert SEEN.within(prompt, tenant) == ([text] if anywhere else [])
        assert not SEEN.within(prompt, f"not {tenant}")


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
def test_answers_cite_what_is_there(kind: type, engine: LayerStream) -> None:
    from langchain_classic.chains import create_retrieval_chain

    llm = kind(engine=engine, max_tokens=40, temperature=1.5, seed=1)
    chain = create_retrieval_chain(_Fixed(), cited_documents_chain(llm))
    found = chain.invoke({"input": "Who keeps light 2?"})["answer"]
    assert set(found.ids) <= {1, 2, 3, 4}
    assert found.documents == tuple(DOCUMENTS[number - 1] for number in found.ids)
    assert "[5]" not in found.answer
    again = asyncio.run(chain.ainvoke({"input": "Who keeps light 2?"}))["answer"]
    assert again == found
    nothing = cited_documents_chain(llm).invoke({"context": [], "input": "Who?"})
    assert nothing.ids == ()
    assert "[1]" in str(rag_prompt(citations=True).invoke({"context": "x", "input": "y"}).to_string())
