"""Copies and pickles of wrappers, before and after their first call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import langchain_layerstream
import layerstream
import pytest
from langchain_layerstream import ChatLayerStream
from langchain_layerstream import LayerStreamLLM as TextLayerStream
from layerstream import LayerStream
from llama_index.core.llms import ChatMessage
from llama_index.llms import layerstream as llama_index_layerstream
from llama_index.llms.layerstream import LayerStreamLLM

OPTIONS = {"kv_store": None, "progress": False, "speculation": "off"}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (ChatLayerStream, {"max_tokens": 2}),
    (TextLayerStream, {"max_tokens": 2}),
    (LayerStreamLLM, {"max_new_tokens": 2}),
]


def ask(llm: Any) -> str:
    if isinstance(llm, LayerStreamLLM):
        return llm.chat([ChatMessage(content="Who leads Brenvik?")]).message.content or ""
    said = llm.invoke("Who leads Brenvik?")
    return said if isinstance(said, str) else said.text


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_a_copy_shares_the_engine_and_a_pickle_finds_it(kind: Any, fields: dict[str, Any]) -> None:
    llm = kind(model="demo", engine_kwargs=OPTIONS, temperature=0, **fields)
    for is_asked in (False, True):
        said = ask(llm) if is_asked else None
        for twin in (copy.deepcopy(llm), copy.copy(llm), pickle.loads(pickle.dumps(llm))):
            assert twin.engine_kwargs == OPTIONS
            assert twin.temperature == 0
            if is_asked:
                assert ask(twin) == said
                assert twin.load() is llm.load()


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_an_engine_that_was_passed_in_is_shared_and_not_pickled(kind: Any, fields: dict[str, Any]) -> None:
    with LayerStream("demo", kv_store=None, progress=False) as engine:
        llm = kind(engine=engine, **fields)
        assert copy.deepcopy([llm, llm])[1].load() is engine
        with pytest.raises(TypeError, match="make it with model="):
            pickle.dumps(llm)


def test_both_say_their_version() -> None:
    for package in (langchain_layerstream, llama_index_layerstream):
        assert package.__version__ == layerstream.__version__
        assert "__version__" in package.__all__
