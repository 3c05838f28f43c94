"""LayerStream for LangChain: models that do not fit, contexts that are computed once.

>>> from langchain_layerstream import ChatLayerStream, rag_prompt
>>> chain = rag_prompt() | ChatLayerStream(model="demo", max_tokens=16)
>>> chain.invoke({"context": "Brenvik is led by Sluba Merkast.", "input": "Who leads Brenvik?"}).text.strip()
'Sluba Merkast'

Importing this package takes little more than LangChain's own base classes; a name loads what it needs when it is first
used, and the model is loaded at the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from layerstream import __version__
from layerstream.errors import MissingExtra

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise MissingExtra("langchain-core", "langchain") from error

if TYPE_CHECKING:
    from langchain_layerstream.chat_models import ChatLayerStream
    from langchain_layerstream.citations import CitedAnswer, cited_documents_chain
    from langchain_layerstream.conversations import add_new_passages, grow_context
    from langchain_layerstream.documents import StablePrefixOrder
    from langchain_layerstream.gangs import gang
    from langchain_layerstream.llms import LayerStreamLLM
    from langchain_layerstream.prompts import context_first, rag_prompt
    from langchain_layerstream.ranking import LayerStreamEmbeddings, LayerStreamReranker
    from langchain_layerstream.situating import ContextualChunks
    from langchain_layerstream.warming import WarmPrefixes

__all__ = [
    "ChatLayerStream",
    "CitedAnswer",
    "ContextualChunks",
    "LayerStreamEmbeddings",
    "LayerStreamLLM",
    "LayerStreamReranker",
    "StablePrefixOrder",
    "WarmPrefixes",
    "__version__",
    "add_new_passages",
    "cited_documents_chain",
    "context_first",
    "gang",
    "grow_context",
    "rag_prompt",
]

_MODULES = {
    "ChatLayerStream": "chat_models",
    "CitedAnswer": "citations",
    "ContextualChunks": "situating",
    "LayerStreamEmbeddings": "ranking",
    "LayerStreamLLM": "llms",
    "LayerStreamReranker": "ranking",
    "StablePrefixOrder": "documents",
    "WarmPrefixes": "warming",
    "add_new_passages": "conversations",
    "cited_documents_chain": "citations",
    "context_first": "prompts",
    "gang": "gangs",
    "grow_context": "conversations",
    "rag_prompt": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
