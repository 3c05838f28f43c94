"""LayerStream for LlamaIndex: models that do not fit, contexts that are computed once.

>>> from llama_index.core.llms import ChatMessage
>>> from llama_index.llms.layerstream import LayerStreamLLM
>>> llm = LayerStreamLLM(model="demo", max_new_tokens=16)
>>> question = "Context:\\nBrenvik is led by Sluba Merkast.\\n\\nQuestion: Who leads Brenvik?"
>>> llm.chat([ChatMessage(role="user", content=question)]).message.content.strip()
'Sluba Merkast'
"""

from layerstream.errors import MissingExtra

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise MissingExtra("llama-index-core", "llama-index") from error

from llama_index.llms.layerstream.base import LayerStreamLLM
from llama_index.llms.layerstream.citations import CITED_QA_PROMPT, CitedSynthesizer
from llama_index.llms.layerstream.conversations import GrowingContext
from llama_index.llms.layerstream.prefixes import (
    CONTEXT_FIRST_REFINE,
    StablePrefixOrder,
    context_first_prompts,
    stable_prompt_helper,
)
from llama_index.llms.layerstream.ranking import LayerStreamEmbeddings, LayerStreamReranker
from llama_index.llms.layerstream.situating import ContextualChunks
from llama_index.llms.layerstream.templates import context_first
from llama_index.llms.layerstream.warming import WarmPrefixes

from layerstream import __version__

__all__ = [
    "CITED_QA_PROMPT",
    "CONTEXT_FIRST_REFINE",
    "CitedSynthesizer",
    "ContextualChunks",
    "GrowingContext",
    "LayerStreamEmbeddings",
    "LayerStreamLLM",
    "LayerStreamReranker",
    "StablePrefixOrder",
    "WarmPrefixes",
    "__version__",
    "context_first",
    "context_first_prompts",
    "stable_prompt_helper",
]
