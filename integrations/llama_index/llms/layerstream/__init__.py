"""LayerStream for LlamaIndex."""

from llama_index.llms.layerstream.base import LayerStreamLLM

__all__ = ["LayerStreamLLM"]
