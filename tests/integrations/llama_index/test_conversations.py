"""Nodes come in behind those that are there: in LlamaIndex's chat engines and its agents' tools."""

from __future__ import annotations

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
