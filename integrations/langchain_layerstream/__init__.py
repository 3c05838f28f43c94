"""LayerStream for LangChain: models that do not fit, contexts that are computed once.

>>> from langchain_layerstream import ChatLayerStream, rag_prompt
>>> chain = rag_prompt() | ChatLayerStream(model="demo", max_tokens=16)
>>> chain.invoke({"context": "Brenvik is led by Sluba Merkast.", "input": "Who leads Brenvik?"}).text.strip()
'Sluba Merkast'
"""

from layerstream.errors import MissingExtra

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise MissingExtra("langchain-core", "langchain") from error

from langchain_layerstream.chat_models import ChatLayerStream
from langchain_layerstream.documents import StablePrefixOrder, WarmPrefixes
from langchain_layerstream.gangs import gang
from langchain_layerstream.llms import LayerStreamLLM
from langchain_layerstream.prompts import rag_prompt

__all__ = ["ChatLayerStream", "LayerStreamLLM", "StablePrefixOrder", "WarmPrefixes", "gang", "rag_prompt"]
