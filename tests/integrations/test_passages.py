"""``reuse="anywhere"`` through both wrappers and the bundled reader: what is moved, and what a call says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_layerstream import ChatLayerStream, cited_documents_chain
from langchain_layerstream import LayerStreamLLM as LangChainLLM
from layerstream import ConfigurationError, KVStoreConfig, LayerStream
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.layerstream import CitedSynthesizer
from llama_index.llms.layerstream import LayerStreamLLM as LlamaIndexLLM

Ask = Callable[..., Any]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LayerStream]:
    with LayerStream(
        "demo", reuse="anywhere", recompute=0.1, kv_store=KVStoreConfig(tmp_path, load="always"), progress=False
    ) as engine:
        engine.trust_reuse()
        yield engine


def texts(kind: str) -> list[str]:
    return [
        f"{name} of {kind} is led by Sluba Merkast, see [{name}]. " * 8 for name in ("Brenvik", "Jaskeld", "Tredry")
    ]


def ask_langchain(engine: LayerStream, chat: bool) -> Ask:
    llm = (ChatLayerStream if chat else LangChainLLM)(engine=engine, max_tokens=2)
    return lambda prompt, **options: llm.invoke(prompt, **options)


def ask_llama_index(engine: LayerStream) -> Ask:
    llm = LlamaIndexLLM(engine=engine, max_new_tokens=2)
    return lambda prompt, **options: llm.complete(prompt, **options)


@pytest.mark.parametrize("which", ["chat", "text", "llama_index"])
def test_a_call_says_its_passages(which: str, engine: LayerStream) -> None:
    ask = ask_llama_index(engine) if which == "llama_index" else ask_langchain(engine, which == "chat")
    passages = texts(which)

    def blended(order: list[int], **options: Any) -> int:
        before = engine.stats().reuse.blended_tokens
        ask("Use this.\n\n" + "\n\n".join(passages[at] for at in order) + "\n\nQuestion: Who leads it?", **options)
        return engine.stats().reuse.blended_tokens - before

    assert blended([0, 1, 2]) == 0, "nobody said what its passages are"
    blended([1, 0, 2], passages=passages)
    assert blended([2, 1, 0], passages=passages) > 100
    assert blended([2, 0, 1], passages=None) == 0
    with pytest.raises(ConfigurationError, match="passages is 'a text'; expected a list of texts"):
        ask("Who?", passages="a text")


@pytest.mark.parametrize("which", ["chat", "text", "llama_index"])
def test_documents_with_numbers_are_found_again_in_another_order(which: str, engine: LayerStream) -> None:
    def answer(order: list[int], tenant: str) -> int:
        before = engine.stats().reuse.blended_tokens
        found = [texts(f"{which} cited")[at] for at in order]
        if which == "llama_index":
            llm = LlamaIndexLLM(engine=engine, max_new_tokens=2, tenant=tenant)
            nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in found]
            CitedSynthesizer(llm, required=False).synthesize("Who?", nodes=nodes)
        else:
            wrapper = ChatLayerStream if which == "chat" else LangChainLLM
            chain = cited_documents_chain(wrapper(engine=engine, max_tokens=2), required=False)
            asked: Any = {"context": [Document(text) for text in found], "input": "Who?"}
            chain.invoke(asked, {"configurable": {"tenant": tenant}})
        return engine.stats().reuse.blended_tokens - before

    answer([0, 1, 2], "acme")
    assert answer([2, 1, 0], "acme") > 100
