"""Chunks get a line that says where they stand, in front of their text or in their metadata."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from langchain_core.documents import Document
from langchain_layerstream import ChatLayerStream, ContextualChunks, LayerStreamLLM
from langchain_text_splitters import RecursiveCharacterTextSplitter
from layerstream import LayerStream

SENTENCES = [f"In year {year} the hall of Brenvik had {year % 7} doors and {year % 11} windows." for year in range(20)]


@pytest.fixture
def engine() -> Iterator[LayerStream]:
    with LayerStream("demo", kv_store=None, progress=False, chunk_tokens=32) as engine:
        yield engine


def documents() -> list[Document]:
    return [
        Document(f"{name}. " + " ".join(SENTENCES), metadata={"source": name}) for name in ("The first", "The second")
    ]


SPLITTER = RecursiveCharacterTextSplitter(chunk_size=300, chunk_overlap=40, add_start_index=True)


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
def test_whole_documents_are_cut_and_situated(engine: LayerStream, kind: type) -> None:
    llm = kind(engine=engine)
    before = engine.stats().sweeps
    made = ContextualChunks(llm=llm, splitter=SPLITTER, max_tokens=8, into="both").transform_documents(documents())
    assert engine.stats().sweeps - before < 3 * 8
    plain = SPLITTER.split_documents(documents())
    assert len(made) == len(plain) > 8
    for chunk, as_cut in zip(made, plain, strict=True):
        line = chunk.metadata["context"]
        assert chunk.page_content == f"{line}\n\n{as_cut.page_content}"
        assert {**as_cut.metadata, "context": line} == chunk.metadata


def test_chunks_of_a_document_are_put_together_again(engine: LayerStream) -> None:
    """In whatever order they come; the lines are those of the whole document."""
    llm = ChatLayerStream(engine=engine)
    whole = ContextualChunks(llm=llm, splitter=SPLITTER, max_tokens=8).transform_documents(documents())
    chunks = SPLITTER.split_documents(documents())
    before = [chunk.model_copy(deep=True) for chunk in chunks]
    mixed = [*chunks[1::2], *chunks[::2]]
    made = ContextualChunks(llm=llm, max_tokens=8).transform_documents(mixed)
    assert sorted(chunk.page_content for chunk in made) == sorted(chunk.page_content for chunk in whole)
    assert [chunk.metadata for chunk in made] == [chunk.metadata for chunk in mixed]
    assert chunks == before, "what was given is left as it is"


def test_into_metadata_alone(engine: LayerStream) -> None:
    llm, given = ChatLayerStream(engine=engine), [Document("Alone."), Document("Alone, too.")]
    made = ContextualChunks(llm=llm, max_tokens=8, into="metadata", metadata_key="about").transform_documents(given)
    assert [chunk.page_content for chunk in made] == ["Alone.", "Alone, too."]
    assert all(chunk.metadata["about"] for chunk in made)
    assert ContextualChunks(llm=llm).transform_documents([]) == []


def test_what_cannot_work(engine: LayerStream) -> None:
    llm = ChatLayerStream(engine=engine)
    long = Document("The house has a door. " * 4000)
    assert ContextualChunks(llm=llm).transform_documents([long]) == [long], "it is left as it is"
    with pytest.raises(ValueError, match="document"):
        ContextualChunks(llm=llm, instructions="Say it.").transform_documents([Document("x")])
    with pytest.raises(ValueError, match="only they know"):
        ContextualChunks(llm="gpt")
