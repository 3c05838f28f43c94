"""Retrieved documents in the order that shares the longest stored prefix.

Only what stands at the very beginning of a prompt can be shared, so of several documents in a context only the first is
found on its own, the second only behind the same first, and so on. Hence two halves: ``WarmPrefixes`` (``warming.py``)
computes every document as the first of a context, and :class:`StablePrefixOrder` puts one that is stored first. In a
conversation passages come in behind those that are there: :mod:`~langchain_layerstream.conversations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from layerstream.api.prefix_order import learned_order, prefix_order
from pydantic import BaseModel, ConfigDict, Field, field_validator

from langchain_layerstream.chat_models import ChatLayerStream
from langchain_layerstream.llms import LayerStreamLLM
from langchain_layerstream.prompts import rag_prompt


class ContextPrompt(BaseModel):
    """How documents become a prompt; the defaults are those of ``create_stuff_documents_chain``."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: BasePromptTemplate = Field(default_factory=rag_prompt)
    """The very prompt that the chain uses."""
    document_prompt: BasePromptTemplate = Field(default_factory=lambda: PromptTemplate.from_template("{page_content}"))
    """How one document is written."""
    document_separator: str = "\n\n"
    """What stands between two."""
    document_variable_name: str = "context"
    """Where they stand in the prompt."""

    def _join(self, documents: Sequence[Document]) -> str:
        return self.document_separator.join(format_document(document, self.document_prompt) for document in documents)

    def _render(self, llm: ChatLayerStream | LayerStreamLLM, context: str, question: str) -> Any:
        """What the engine would be given for *context*, and for *question* in all other places."""
        types = self.prompt.input_types
        values = {name: [] if "list" in str(types.get(name, "")).lower() else question for name in self._variables()}
        value = self.prompt.format_prompt(**{**values, self.document_variable_name: context})
        if isinstance(llm, ChatLayerStream):
            return llm.prompt_for(value.to_messages())
        return llm.prompt_for(value.to_string())

    def _variables(self) -> list[str]:
        return [name for name in self.prompt.input_variables if name != self.document_variable_name]


def check_model(llm: Any) -> Any:
    """*llm*, if its KV is known."""
    if llm is None or isinstance(llm, ChatLayerStream | LayerStreamLLM):
        return llm
    raise ValueError(f"llm is a ChatLayerStream or a LayerStreamLLM, not {type(llm).__name__}: only they know their KV")


class StablePrefixOrder(ContextPrompt, RunnableSerializable[list[Document], list[Document]]):
    """Puts retrieved documents into the order that shares the longest stored prefix.

    Behind a retriever: ``retriever | StablePrefixOrder(llm=llm, prompt=prompt)``. What the store does not know stands
    by how often it was retrieved, so that what many questions bring comes first; equals stand in an order of their own
    (source, position), the same for every question. Without *llm* that order alone is used.
    """

    llm: Any = None
    """The model whose store is asked."""
    learn: bool = True
    """Count retrievals, and put what is retrieved often first."""
    _check_llm = field_validator("llm")(check_model)

    def invoke(self, input: list[Document], config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """*input*, reordered."""
        return self._call_with_config(self._order, input, config, **kwargs)

    def _order(self, documents: list[Document]) -> list[Document]:
        if self.llm is None:
            return prefix_order(documents, canonical)
        engine, tenant = self.llm.load(), self.llm._tenant_of()

        def render(context: str) -> Any:
            return self._render(self.llm, context, "?")

        def cached_tokens(some: Sequence[Document]) -> int:
            return engine.cached_tokens(render(self._join(some)), tenant=tenant)

        if self.learn:
            return learned_order(engine, documents, canonical, self._join, render, tenant)
        return prefix_order(documents, canonical, cached_tokens)


def canonical(document: Document) -> tuple[str, float, str, str]:
    """Where a document comes from, and where it stands there."""
    about = document.metadata
    position = next((about[key] for key in ("start_index", "chunk", "page") if isinstance(about.get(key), int)), 0)
    return str(about.get("source", "")), position, document.id or "", document.page_content
