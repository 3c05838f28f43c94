"""Contexts in the order that is stored, computed when nodes enter the index, packed alike for every question."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from layerstream import ConfigurationError, KVStoreConfig, LayerStream
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.llms.layerstream import (
    LayerStreamLLM,
    StablePrefixOrder,
    WarmPrefixes,
    context_first_prompts,
    stable_prompt_helper,
)

from tests.integrations.fake_engine import FakeEngine

FACTS = ["is led by Sluba Merkast", "was founded in 1921", "is located in Tredry", "makes the Dwefebix lens"]


def nodes(count: int = 4) -> list[NodeWithScore]:
    names = ["Brenvik", "Gukrand", "Jaskeld", "Vanorth"]
    found = []
    for name in names[:count]:
        text = "\n".join(f"{name} {fact} and stands in row {row}." for row in range(3) for fact in FACTS)
        source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=name)}
        found.append(NodeWithScore(node=TextNode(text=text, id_=name, relationships=source), score=0.5))
    return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LayerStream]:
    with LayerStream(
        "demo", kv_store=KVStoreConfig(tmp_path, load="always"), progress=False, chunk_tokens=32
    ) as engine:
        yield engine


class Rotating(BaseRetriever):
    """Finds the same nodes in another order each time."""

    def __init__(self) -> None:
        self._times = 0
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self._times += 1
        found = nodes(3)
        return found[self._times % 3 :] + found[: self._times % 3]


def reused(engine: LayerStream) -> int:
    engine._open_store().flush()
    return engine.stats().kv.reused_tokens


def test_without_a_model_the_order_is_canonical() -> None:
    ordered = StablePrefixOrder().postprocess_nodes(nodes()[::-1], query_str="x")
    assert [found.node.node_id for found in ordered] == ["Brenvik", "Gukrand", "Jaskeld", "Vanorth"]


def test_a_query_engine_reuses_what_the_retriever_rotates(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    query_engine = RetrieverQueryEngine.from_args(Rotating(), llm=llm, node_postprocessors=[StablePrefixOrder(llm=llm)])
    query_engine.query("Who leads Brenvik?")
    before = reused(engine)
    query_engine.query("Who leads Gukrand?")
    assert reused(engine) > before + 300


def test_nodes_that_were_warmed_are_there_for_the_first_question(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    given = [found.node for found in nodes()]
    warm = WarmPrefixes(llm=llm)
    assert [n.node_id for n in IngestionPipeline(transformations=[warm]).run(nodes=given)] == [n.node_id for n in given]
    chosen = StablePrefixOrder(llm=llm).postprocess_nodes(nodes()[2:3], query_str="x")
    before = reused(engine)
    synthesizer = get_response_synthesizer(llm=llm)
    synthesizer.synthesize("Who leads Jaskeld?", nodes=chosen)
    assert reused(engine) > before + 200


def test_a_prompt_with_the_question_first_is_refused(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine)
    template = PromptTemplate("{query_str}\n{context_str}")
    with pytest.raises(ConfigurationError, match="question before the context"):
        WarmPrefixes(llm=llm, prompt=template)([found.node for found in nodes()])


def test_long_contexts_are_packed_alike_whatever_the_question(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=16)
    template, texts = PromptTemplate("{context_str}\n{query_str}"), [found.node.get_content() for found in nodes() * 3]
    questions = ["Who?", "Who leads Brenvik, and since when, and in which town does it stand?"]
    packed = [
        stable_prompt_helper(llm).repack(template.partial_format(query_str=question), texts, llm=llm)
        for question in questions
    ]
    assert packed[0] == packed[1]
    assert len(packed[0]) > 1
    with pytest.raises(ValueError, match="no room"):
        stable_prompt_helper(llm, reserve_tokens=4096)


def test_refine_prompts_of_text_models_begin_with_the_context() -> None:
    """As far as two questions have their prompts in common."""
    shared = []
    for prompts in ({}, context_first_prompts()):
        engine = FakeEngine()
        llm = LayerStreamLLM(engine=engine, context_window=4096)
        query_engine = RetrieverQueryEngine.from_args(
            Rotating(), llm=llm, node_postprocessors=[StablePrefixOrder()], response_mode="refine"
        )
        query_engine.update_prompts(prompts)
        for question in ("Who leads Brenvik?", "Since when has Gukrand existed?"):
            query_engine.query(question)
        first, second = (engine.batches[at][0] for at in (1, 4))
        common = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        shared.append(sum(1 for _ in common) / len(first))
    assert shared[0] < 0.1
    assert shared[1] > 0.7


def test_what_many_questions_bring_comes_first(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, max_new_tokens=2)
    first, second, third, popular = nodes()
    order = StablePrefixOrder(llm=llm)
    for other in (first, second, third):
        order.postprocess_nodes([other, popular], query_str="x")
    assert order.postprocess_nodes([first, second, popular], query_str="x")[0] == popular
    unlearned = StablePrefixOrder(llm=llm, learn=False)
    assert unlearned.postprocess_nodes([popular, first], query_str="x") == [first, popular]


def test_the_order_is_a_tenants(engine: LayerStream) -> None:
    llm = LayerStreamLLM(engine=engine, tenant="own", max_new_tokens=2)
    first, second, third = nodes(3)
    for _ in range(4):
        StablePrefixOrder(llm=llm, tenant="acme").postprocess_nodes([third])
        StablePrefixOrder(llm=llm).postprocess_nodes([second])
    given = [first, second, third]
    assert StablePrefixOrder(llm=llm, tenant="acme").postprocess_nodes(given) == [third, first, second]
    assert StablePrefixOrder(llm=llm).postprocess_nodes(given) == [second, first, third]
    assert StablePrefixOrder(llm=llm, tenant="").postprocess_nodes(given) == given
    unlearned = StablePrefixOrder(llm=llm, tenant="acme", learn=False)
    prompt = get_response_synthesizer(llm=llm, use_async=False)
    prompt.synthesize("Who leads it?", nodes=[third, second])
    engine._open_store().flush()
    assert unlearned.postprocess_nodes(given) == given, "what is stored is the other tenant's"
    own = StablePrefixOrder(llm=llm, learn=False)
    assert own.postprocess_nodes(given)[0] == third
