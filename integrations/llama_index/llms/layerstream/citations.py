"""Answers that cite the nodes in their prompt by number, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.layerstream.base import LayerStreamLLM

from layerstream.api.citations import citation_format, number_passages, without_numbers

CITED_QA_PROMPT = PromptTemplate(
    "Passages are below, each behind its number.\n---------------------\n{context_str}\n---------------------\n"
    "Answer the query from the passages alone, and cite those that you used by their numbers in brackets, "
    "such as [1].\n"
    "Query: {query_str}\nAnswer: "
)
"""A question answering prompt for numbered passages."""


class CitedSynthesizer(BaseSynthesizer):
    """Answers from numbered nodes; the grammar lets an answer cite numbers that are there alone.

    ``[n]`` is the n-th of the response's ``source_nodes``; ``layerstream.api.citations.read_citations`` reads them.
    ``RetrieverQueryEngine(retriever, response_synthesizer=CitedSynthesizer(llm))``.

    Args:
        required: every answer ends with a citation.
    """

    def __init__(
        self,
        llm: LayerStreamLLM,
        prompt: BasePromptTemplate = CITED_QA_PROMPT,
        *,
        required: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(llm=llm, **options)
        self._model = llm
        self._prompt = prompt
        self._required = required

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """The answer to *query_str* from *text_chunks*, one for each node."""
        return self._llm.complete(self._ask(query_str, text_chunks), **self._format(text_chunks)).text.strip()

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """As :meth:`get_response`, without blocking the event loop."""
        answer = await self._llm.acomplete(self._ask(query_str, text_chunks), **self._format(text_chunks))
        return answer.text.strip()

    def _ask(self, query: str, texts: Sequence[str]) -> str:
        self._model._handle.note_passages(without_numbers(texts), self._model.tenant)
        return self._prompt.format(llm=self._llm, context_str=number_passages(texts), query_str=query)

    def _format(self, texts: Sequence[str]) -> dict[str, Any]:
        ids = range(1, len(texts) + 1)
        return {"response_format": citation_format(ids, required=self._required)} if texts else {}

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._prompt}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._prompt = prompts.get("text_qa_template", self._prompt)
