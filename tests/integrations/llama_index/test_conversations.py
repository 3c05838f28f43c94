"""Nodes come in behind those that are there: in LlamaIndex's chat engines and its agents' tools."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import RetrieverTool
from llama_index.llms.layerstream import GrowingContext, LayerStreamLLM

from tests.integrations.fake_engine import FakeEngine


class Letters(BaseRetriever):
    """A node for each letter between bars, in the order of the letters."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        letters = query_bundle.query_str.split("|")[1]
        return [NodeWithScore(node=TextNode(text=letter * 3, id_=letter), score=0.5) for letter in letters]


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chats_context_grows_at_its_end(kind: Any) -> None:
    fake = FakeEngine(has_chat_template=True)
    fake.words = ["|ca|"]  # also the question that stands alone
    growing = GrowingContext(most=3)
    engine = kind.from_defaults(
        Letters(),
        llm=LayerStreamLLM(engine=fake, context_window=4096),
        memory=ChatMemoryBuffer.from_defaults(token_limit=4000, tokenizer_fn=words),
        node_postprocessors=[growing],
    )
    engine.chat("|ba|")
    engine.chat("|ca|")
    prompts = [str(batch[-1]) for batch in fake.batches]
    assert "bbb\n\naaa\n\nccc" in prompts[-1]
    assert prompts[-1].startswith(prompts[0][: prompts[0].index("aaa") + 3]), "as far as the first turn's context"
    fake.words = ["|xy|"]
    engine.chat("|xy|")
    assert "xxx\n\nyyy" in str(fake.batches[-1][-1]), "five are too many: it begins again"
    growing.reset()
    engine.chat("|xy|")
    assert "xxx\n\nyyy" in str(fake.batches[-1][-1])


def test_a_tools_result_has_only_what_is_new() -> None:
    tool = RetrieverTool.from_defaults(Letters(), node_postprocessors=[GrowingContext(only_new=True)])
    results = [str(tool.call(query).content).split() for query in ("|ba|", "|abc|", "|c|")]
    assert results == [["bbb", "aaa"], ["ccc"], []]


@pytest.mark.parametrize("only_new", [False, True])
def test_one_conversation_from_many_threads(only_new: bool) -> None:
    growing = GrowingContext(most=None, only_new=only_new)

    def found(*names: str) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=name, id_=name), score=0.5) for name in names]

    with ThreadPoolExecutor(8) as pool:
        calls = [found(f"common {call}", f"own {call} {thread}") for call in range(20) for thread in range(8)]
        returned = list(pool.map(growing.postprocess_nodes, calls))
    names = [node.node.node_id for some in returned for node in some] if only_new else None
    last = [node.node.node_id for node in max(returned, key=len)] if names is None else names
    assert len(last) == 20 + 160
    assert len(set(last)) == 20 + 160
    growing.reset()
    assert growing.postprocess_nodes(found("common 1")) == found("common 1")


def test_copies_go_on_alone() -> None:
    growing = GrowingContext()
    node = NodeWithScore(node=TextNode(text="a", id_="a"), score=0.5)
    growing.postprocess_nodes([node])
    for other in (copy.deepcopy(growing), pickle.loads(pickle.dumps(growing))):
        assert other.postprocess_nodes([]) == [node]
        other.reset()
    assert growing.postprocess_nodes([]) == [node]
