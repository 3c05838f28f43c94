"""LayerStream for LangChain."""

from langchain_layerstream.llms import LayerStreamLLM

__all__ = ["LayerStreamLLM"]
