"""What is warmed is what LlamaIndex's own query engines then send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from layerstream import KVStoreConfig, LayerStream
from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceWindowNodeParser, get_leaf_nodes
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import AutoMergingRetriever, BaseRetriever
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.llms.layerstream import LayerStreamLLM, WarmPrefixes
from llama_index.llms.layerstream.warming import shown_nodes

SENTENCES = [f"In year {year} the hall of Brenvik had {year % 7} doors and {year % 11} windows." for year in range(40)]
CHUNK = 32


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LayerStream]:
    with LayerStream(
        "demo", kv_store=KVStoreConfig(tmp_path, load="always"), progress=False, chunk_tokens=CHUNK
    ) as engine:
        yield engine


class Finding(BaseRetriever):
    """Finds copies of the same nodes for every question, as an index would."""

    def __init__(self, nodes: Sequence[BaseNode]) -> None:
        self._nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node.model_copy(deep=True), score=0.5) for node in self._nodes]


def check_first_question_finds(
    engine: LayerStream, warm: WarmPrefixes, nodes: Sequence[BaseNode], shown: str, ask: Callable[[], object]
) -> None:
    """With *nodes* warmed, all pages of the prompt up to the end of *shown* are there for the first question."""
    before = [node.model_dump_json() for node in nodes]
    assert warm(nodes) is nodes
    assert [node.model_dump_json() for node in nodes] == before, "they are left as they are"
    assert shown in warm.texts(nodes)
    engine._open_store().flush()
    prefix = engine.forecast_warm([shown], prompt=warm._render)
    assert prefix.missing_tokens == 0
    reused = engine.stats().kv.reused_tokens
    ask()
    assert engine.stats().kv.reused_tokens - reused == prefix.prefix_tokens > len(shown) / 10


def test_of_a_sentence_the_window_is_computed(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    parser = SentenceWindowNodeParser.from_defaults(
        sentence_splitter=lambda text: [f"{sentence}." for sentence in text.split(".") if sentence], window_size=3
    )
    nodes = parser.get_nodes_from_documents([Document(text=" ".join(SENTENCES), metadata={"title": "Brenvik"})])
    warm = WarmPrefixes(llm=llm)
    query_engine = RetrieverQueryEngine.from_args(
        Finding(nodes[20:21]), llm=llm, node_postprocessors=[MetadataReplacementPostProcessor("window")]
    )
    window = f"title: Brenvik\n\n{nodes[20].metadata['window']}"
    check_first_question_finds(engine, warm, nodes, window, lambda: query_engine.query("How many doors?"))
    as_found = WarmPrefixes(llm=llm, window_key=None).texts(nodes[20:21])
    assert as_found == [f"title: Brenvik\n\n{nodes[20].get_content()}".strip()]


def test_a_window_that_the_model_is_shown_replaces_nothing() -> None:
    node = TextNode(text="a sentence", metadata={"window": "kitchen"})
    assert list(shown_nodes([node], lambda _: None)) == [node]


@pytest.mark.parametrize("source", ["docstore", "storage context", "the nodes themselves"])
def test_of_merged_leaves_the_parent_is_computed(engine: LayerStream, source: str) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[512, 128], chunk_overlap=0)
    nodes = parser.get_nodes_from_documents([Document(text=" ".join(SENTENCES))])
    leaves = get_leaf_nodes(nodes)
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    stores = {"docstore": storage.docstore, "storage context": storage}
    warm = WarmPrefixes(llm=llm, docstore=stores.get(source))
    children = [leaf for leaf in leaves if leaf.parent_node.node_id == leaves[0].parent_node.node_id]  # type: ignore[union-attr]
    assert len(children) > 2
    retriever = AutoMergingRetriever(Finding(children), storage)  # type: ignore[arg-type]
    (merged,) = retriever.retrieve("x")
    assert merged.node.node_id == leaves[0].parent_node.node_id  # type: ignore[union-attr]
    query_engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    given = nodes if source == "the nodes themselves" else leaves
    check_first_question_finds(engine, warm, given, merged.text.strip(), lambda: query_engine.query("How many doors?"))
    assert leaves[0].get_content().strip() in warm.texts(leaves), "too few of them are shown as they are"


def test_parents_that_are_not_here_are_said(engine: LayerStream, caplog: pytest.LogCaptureFixture) -> None:
    leaf = TextNode(text="x", relationships={NodeRelationship.PARENT: RelatedNodeInfo(node_id="gone")})
    assert list(shown_nodes([leaf], lambda _: None)) == [leaf]
    assert "docstore=" in caplog.text


def test_an_only_child_is_always_merged() -> None:
    parent = TextNode(text="all of it", id_="p", relationships={NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c")]})
    child = TextNode(text="all", id_="c", relationships={NodeRelationship.PARENT: RelatedNodeInfo(node_id="p")})
    find = {"p": parent, "c": child}.get
    assert [node.node_id for node in shown_nodes([child], find)] == ["p"]
    assert [node.node_id for node in shown_nodes([child], find, merge_ratio=1.0)] == ["c", "p"]


def test_metadata_is_shown_as_the_node_says(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    node = TextNode(
        text=" ".join(SENTENCES[:12]),
        metadata={"title": "The hall of Brenvik", "checksum": "4711"},
        excluded_llm_metadata_keys=["checksum"],
        text_template="<<{metadata_str}>>\n{content}",
    )
    warm = WarmPrefixes(llm=llm)
    (shown,) = warm.texts([node])
    assert shown.startswith("<<title: The hall of Brenvik>>")
    assert "4711" not in shown
    query_engine = RetrieverQueryEngine.from_args(Finding([node]), llm=llm)
    check_first_question_finds(engine, warm, [node], shown, lambda: query_engine.query("How many doors?"))


def test_documents_are_nodes_too(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    nodes = [Document(text=" ".join(SENTENCES[:12]))]
    warm = WarmPrefixes(llm=llm)
    query_engine = VectorStoreIndex(nodes, embed_model=MockEmbedding(8)).as_query_engine(llm=llm)
    check_first_question_finds(engine, warm, nodes, warm.texts(nodes)[0], lambda: query_engine.query("How many doors?"))


def test_the_popular_ones_in_the_background(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    nodes = [TextNode(text=" ".join(SENTENCES[at : at + 10])) for at in range(0, 40, 10)]
    asked_for = nodes[2].get_content()
    engine.note_retrieved([asked_for])
    warm = WarmPrefixes(llm=llm, top=1, budget="1GB", background=True)
    forecast = warm.forecast(nodes)
    assert (forecast.chosen, forecast.coverage) == (1, 1.0)
    warming = warm.warm(nodes)
    assert warming is not None
    assert warming.wait(60).warmed == 1
    assert engine.forecast_warm([asked_for], prompt=warm._render).missing_tokens == 0
