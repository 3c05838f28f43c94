"""Answers that cite the documents in their prompt by number, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from layerstream.api.citations import citation_format, number_passages, read_citations, without_numbers

from langchain_layerstream.chat_models import ChatLayerStream
from langchain_layerstream.llms import LayerStreamLLM
from langchain_layerstream.prompts import rag_prompt

_DOCUMENT = PromptTemplate.from_template("{page_content}")


@dataclass(frozen=True, slots=True)
class CitedAnswer:
    """An answer: with its citations (``answer``), without them (``text``), what it cites, and those documents."""

    answer: str
    text: str
    ids: tuple[int, ...]
    documents: tuple[Document, ...]

    def __str__(self) -> str:
        return self.answer


def cited_documents_chain(
    llm: ChatLayerStream | LayerStreamLLM,
    prompt: BasePromptTemplate | None = None,
    *,
    document_prompt: BasePromptTemplate = _DOCUMENT,
    document_variable_name: str = "context",
    required: bool = True,
) -> Runnable[dict[str, Any], CitedAnswer]:
    """In the place of ``create_stuff_documents_chain``: documents are numbered in the prompt, and the grammar lets the
    answer cite numbers that are there alone. Without documents the answer cites nothing.

    Args:
        prompt: with a place for the documents; ``None``: ``rag_prompt(citations=True)``.
        required: every answer ends with a citation.
    """
    template = prompt or rag_prompt(citations=True)

    def prepare(values: dict[str, Any], config: RunnableConfig) -> tuple[Any, list[Document], dict[str, Any]]:
        documents: Sequence[Document] = values[document_variable_name]
        texts = [format_document(document, document_prompt) for document in documents]
        llm._handle.note_passages(without_numbers(texts), llm._tenant_of(config))
        context = number_passages(texts)
        ids = range(1, len(documents) + 1)
        bound = {"response_format": citation_format(ids, required=required)} if documents else {}
        return template.invoke({**values, document_variable_name: context}), list(documents), bound

    def read(said: Any, documents: list[Document]) -> CitedAnswer:
        answer = (said if isinstance(said, str) else said.text).strip()
        found = read_citations(answer, range(1, len(documents) + 1))
        return CitedAnswer(answer, found.text, found.ids, tuple(documents[number - 1] for number in found.ids))

    def answer(values: dict[str, Any], config: RunnableConfig) -> CitedAnswer:
        asked, documents, bound = prepare(values, config)
        return read(llm.invoke(asked, config, **bound), documents)

    async def aanswer(values: dict[str, Any], config: RunnableConfig) -> CitedAnswer:
        asked, documents, bound = prepare(values, config)
        return read(await llm.ainvoke(asked, config, **bound), documents)

    return RunnableLambda(answer, aanswer, name="cited_documents_chain")
