"""Nodes get a line that says where they stand, in their metadata or in front of their text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from layerstream import LayerStream
from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.llms.layerstream import ContextualChunks, LayerStreamLLM

SENTENCES = [f"In year {year} the hall of Brenvik had {year % 7} doors and {year % 11} windows." for year in range(20)]
SPLITTER = SentenceSplitter(
    chunk_size=80, chunk_overlap=10, chunking_tokenizer_fn=lambda text: text.replace(". ", ".\n").splitlines()
)


@pytest.fixture
def llm() -> Iterator[LayerStreamLLM]:
    with LayerStream("demo", kv_store=None, progress=False, chunk_tokens=32) as engine:
        yield LayerStreamLLM(engine=engine)


def documents() -> list[Document]:
    return [Document(text=f"{name}. " + " ".join(SENTENCES), id_=name) for name in ("The first", "The second")]


def test_in_a_pipeline(llm: LayerStreamLLM) -> None:
    engine = llm.load()
    before = engine.stats().sweeps
    nodes = IngestionPipeline(transformations=[SPLITTER, ContextualChunks(llm=llm, max_tokens=8)]).run(
        documents=documents()
    )
    assert engine.stats().sweeps - before < 3 * 8
    plain = SPLITTER.get_nodes_from_documents(documents())
    assert [node.get_content() for node in nodes] == [node.get_content() for node in plain]
    assert len(nodes) > 8
    for node in nodes:
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert node.get_content(mode).startswith(f"context: {node.metadata['context']}\n\n")


def test_in_front_of_the_text_whatever_the_order(llm: LayerStreamLLM) -> None:
    plain = SPLITTER.get_nodes_from_documents(documents())
    before = [node.model_dump_json() for node in plain]
    situated = ContextualChunks(llm=llm, max_tokens=8, into="both")
    made = {node.node_id: node for node in situated([*plain[1::2], *plain[::2]])}
    again = situated(plain)
    for node, same in zip(plain, again, strict=True):
        assert made[node.node_id].model_dump() == same.model_dump(), "the document is the same, and so is the line"
        assert same.get_content() == f"{same.metadata['context']}\n\n{node.get_content()}"
    assert [node.model_dump_json() for node in plain] == before, "what was given is left as it is"


def test_what_cannot_work(llm: LayerStreamLLM) -> None:
    assert ContextualChunks(llm=llm)([]) == []
    long = TextNode(text="The house has a door. " * 4000)
    assert ContextualChunks(llm=llm)([long])[0] is long, "it is left as it is"
    with pytest.raises(ValueError, match="document"):
        ContextualChunks(llm=llm, instructions="Say it.")([TextNode(text="x")])
