"""What is warmed is what LangChain's own chains then send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ParentDocumentRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.prompts import PromptTemplate
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_layerstream import ChatLayerStream, WarmPrefixes, rag_prompt
from langchain_text_splitters import CharacterTextSplitter
from layerstream import ConfigurationError, KVStoreConfig, LayerStream

SENTENCES = [f"In year {year} the hall of Brenvik had {year % 7} doors and {year % 11} windows." for year in range(40)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LayerStream]:
    with LayerStream(
        "demo", kv_store=KVStoreConfig(tmp_path, load="always"), progress=False, chunk_tokens=32
    ) as engine:
        yield engine


def parents() -> list[Document]:
    return [
        Document(" ".join(SENTENCES[at : at + 10]), metadata={"title": f"Years {at} to {at + 9}"})
        for at in range(0, 40, 10)
    ]


def retriever(**more: Any) -> ParentDocumentRetriever:
    made = ParentDocumentRetriever(
        vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)),
        docstore=InMemoryStore(),
        child_splitter=CharacterTextSplitter(separator=". ", chunk_size=100, chunk_overlap=0),
        search_kwargs={"k": 1},
        **more,
    )
    made.add_documents(parents())
    return made


def check_first_question_finds(engine: LayerStream, warm: WarmPrefixes, found: Any) -> None:
    """All pages of the prompt up to the end of what is *found* are there for the first question."""
    llm, prompt = warm.llm, warm.prompt
    answer = create_stuff_documents_chain(llm, prompt, document_prompt=warm.document_prompt)  # type: ignore[arg-type]
    chain = create_retrieval_chain(found, answer)
    engine._open_store().flush()
    before = engine.stats().kv.reused_tokens
    shown = chain.invoke({"input": "How many doors?"})["context"]
    assert len(shown) == 1
    prefix = engine.forecast_warm([warm._join(shown)], prompt=warm._shape)
    assert prefix.missing_tokens == 0
    assert engine.stats().kv.reused_tokens - before == prefix.prefix_tokens > 200


def test_of_a_child_the_parent_is_computed(engine: LayerStream) -> None:
    llm, found = ChatLayerStream(engine=engine, max_tokens=2), retriever()
    children = found.vectorstore.similarity_search("x", k=100)
    assert len(children) > 10
    warm = WarmPrefixes(llm=llm, docstore=found.docstore)
    assert warm.transform_documents(children) is children
    assert sorted(warm.texts(children)) == sorted(document.page_content for document in parents())
    check_first_question_finds(engine, warm, found)


def test_all_that_the_docstore_has_with_metadata_in_the_prompt(engine: LayerStream) -> None:
    llm, found = ChatLayerStream(engine=engine, max_tokens=2), retriever()
    written = PromptTemplate.from_template("{title}:\n{page_content}")
    warm = WarmPrefixes(llm=llm, prompt=rag_prompt(), document_prompt=written, docstore=found.docstore)
    assert warm.forecast().chosen == 4
    warm.warm_docstore()
    assert warm.forecast().missing_tokens == 0
    check_first_question_finds(engine, warm, found)


def test_children_without_a_parent_are_never_shown(engine: LayerStream) -> None:
    llm, found = ChatLayerStream(engine=engine), retriever()
    warm = WarmPrefixes(llm=llm, docstore=found.docstore)
    assert warm.texts([Document("x", metadata={"doc_id": "gone"}), Document("y")]) == ["y"]
    assert WarmPrefixes(llm=llm).texts([Document("x", metadata={"doc_id": "gone"})]) == ["x"]
    with pytest.raises(ConfigurationError, match="no docstore"):
        WarmPrefixes(llm=llm).warm_docstore()


def test_the_popular_ones_in_the_background(engine: LayerStream) -> None:
    llm, given = ChatLayerStream(engine=engine, max_tokens=2), parents()
    engine.note_retrieved([given[2].page_content])
    warm = WarmPrefixes(llm=llm, top=1, budget="1GB", background=True)
    forecast = warm.forecast(given)
    assert (forecast.chosen, forecast.left_out, forecast.coverage) == (1, 3, 1.0)
    assert forecast.reused_share == pytest.approx(0.25, abs=0.05), "one of four documents"
    warming = warm.warm(given)
    assert warming is not None
    assert warming.wait(60).warmed == 1
    assert engine.forecast_warm([given[2].page_content], prompt=warm._shape).missing_tokens == 0
    assert warm.transform_documents(given) is given
