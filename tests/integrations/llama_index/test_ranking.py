"""Embeddings, reranker and citations with LlamaIndex's own indices and query engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from layerstream import LayerStream
from layerstream.api.citations import read_citations
from layerstream.ranking.forms import RerankForm
from layerstream.text.passages import SEEN
from llama_index.core import VectorStoreIndex
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.layerstream import CitedSynthesizer, LayerStreamEmbeddings, LayerStreamLLM, LayerStreamReranker

from tests.integrations.fake_engine import FakeEngine

TEXTS = [f"Passage {number}: the keeper of light {number} is away. " * 2 for number in range(4)]
NODES = [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS)]
FORM = RerankForm(pieces=("A: {query}", "\n", "B: {passage}", "\n", "Good?"), tokens=("y", "n"))


@pytest.fixture(scope="module")
def engine(babbler: str) -> Iterator[LayerStream]:
    with LayerStream(babbler, dtype="float32", kv_store=None, progress=False) as engine:
        yield engine


def test_an_index_answers_and_cites(engine: LayerStream) -> None:
    embeddings = LayerStreamEmbeddings(engine=engine, instruction="")
    index = VectorStoreIndex(list(NODES), embed_model=embeddings)
    assert index.as_retriever(similarity_top_k=1).retrieve(TEXTS[2])[0].node.node_id == "2"
    llm = LayerStreamLLM(engine=engine, max_new_tokens=40, temperature=1.5, seed=1, client="cites")
    query_engine = RetrieverQueryEngine(
        index.as_retriever(similarity_top_k=3),
        response_synthesizer=CitedSynthesizer(llm),
        node_postprocessors=[LayerStreamReranker(engine=engine, form=FORM, top_n=2)],
    )
    response = query_engine.query("Who keeps light 2?")
    assert len(response.source_nodes) == 2
    assert set(read_citations(str(response)).ids) <= {1, 2}
    assert str(asyncio.run(query_engine.aquery("Who keeps light 2?"))) == str(response)
    assert engine.stats().clients["cites"].requests == 2


def test_embeddings_are_the_same_alone_and_awaited(engine: LayerStream) -> None:
    embeddings = LayerStreamEmbeddings(engine=engine)
    together = embeddings.get_text_embedding_batch(TEXTS)
    assert together == [embeddings.get_text_embedding(text) for text in TEXTS]
    assert together == asyncio.run(embeddings.aget_text_embedding_batch(TEXTS))
    assert embeddings.get_query_embedding("Who?") == asyncio.run(embeddings.aget_query_embedding("Who?"))
    assert embeddings.get_text_embedding_batch([]) == []


def test_a_reranker_wants_a_query(engine: LayerStream) -> None:
    reranker = LayerStreamReranker(engine=engine, form=FORM)
    found = [NodeWithScore(node=node, score=0.0) for node in NODES]
    ranked = reranker.postprocess_nodes(found, query_str="Who keeps light 2?")
    scores = [node.score or 0.0 for node in ranked]
    assert scores == sorted(scores, reverse=True)
    assert reranker.postprocess_nodes([], query_str="Who?") == []
    with pytest.raises(ValueError, match="query"):
        reranker.postprocess_nodes(found)


@pytest.mark.parametrize("anywhere", [False, True])
async def test_numbered_nodes_are_passages_as_they_stand(anywhere: bool) -> None:
    fake = FakeEngine()
    fake.reuses_anywhere = anywhere
    tenant = f"cites {anywhere}"
    synthesizer = CitedSynthesizer(LayerStreamLLM(engine=fake, tenant=tenant))
    found = [
        NodeWithScore(node=TextNode(text="As [7] says, the keeper is away.", metadata={"source": "a.md"}), score=1)
    ]
    synthesizer.synthesize("Who?", nodes=found)
    await synthesizer.asynthesize("Who?", nodes=found)
    for (prompt,) in fake.batches:
        assert "[1] source: a.md\n\nAs (7) says, the keeper is away." in prompt
        expected = ["source: a.md\n\nAs (7) says, the keeper is away."]
        assert SEEN.within(prompt, tenant) == (expected if anywhere else [])
        assert not SEEN.within(prompt, "another")
