"""Retrieved nodes in the order that shares the longest stored prefix, and prompts that keep it.

Only what stands at the very beginning of a prompt can be shared, so of several nodes in a context only the first is
found on its own, the second only behind the same first, and so on. Hence two halves: ``WarmPrefixes`` (``warming.py``)
computes every node as the first of a context, and :class:`StablePrefixOrder` puts one that is stored first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate, SelectorPromptTemplate
from llama_index.core.prompts.chat_prompts import CHAT_REFINE_PROMPT
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.utils import is_chat_model
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.llms.layerstream.base import LayerStreamLLM

from layerstream.api.prefix_order import learned_order, prefix_order

CONTEXT_FIRST_REFINE = PromptTemplate(
    "More context is below.\n---------------------\n{context_msg}\n---------------------\n"
    "The original query is: {query_str}\nThere is an answer already: {existing_answer}\n"
    "With the new context, refine the answer to the query. If the context is not useful, return the original answer.\n"
    "Refined Answer: "
)
"""A refine prompt for text models with the context before what changes from question to question."""


def context_first_prompts() -> dict[str, BasePromptTemplate]:
    """For ``query_engine.update_prompts``: prompts that begin with the context, so that its KV is found.

    LlamaIndex's own do, but for the refine prompt of models without a chat template, which begins with the question.
    """
    refine = SelectorPromptTemplate(CONTEXT_FIRST_REFINE, conditionals=[(is_chat_model, CHAT_REFINE_PROMPT)])
    return {"response_synthesizer:refine_template": refine}


def stable_prompt_helper(llm: LayerStreamLLM, reserve_tokens: int | None = None) -> PromptHelper:
    """A prompt helper that packs nodes alike for every question.

    LlamaIndex fills the context to the last token, so where nodes do not fit one prompt, the length of the question
    decides where they are cut, and the next question shares nothing. This one leaves room for the prompt and for
    questions of up to *reserve_tokens* (by default a quarter of the context), and cuts at the same places always.
    """
    metadata = llm.metadata
    reserve = metadata.context_window // 4 if reserve_tokens is None else reserve_tokens
    limit = metadata.context_window - metadata.num_output - reserve
    if limit < 1:
        raise ValueError(
            f"a context of {metadata.context_window} tokens has no room for {metadata.num_output} of the answer and "
            f"{reserve} in reserve: lower max_new_tokens or reserve_tokens"
        )
    return PromptHelper.from_llm_metadata(
        metadata, chunk_overlap_ratio=0.0, chunk_size_limit=limit, tokenizer=llm.tokenize
    )


class StablePrefixOrder(BaseNodePostprocessor):
    """Puts retrieved nodes into the order that shares the longest stored prefix; the last of the postprocessors.

    What the store does not know stands by how often it was retrieved, so that what many questions bring comes first;
    equals stand in an order of their own (document, position), the same for every question. Without *llm* that order
    alone is used. *prompt* is the one that the context goes into first: ``text_qa_template``
    for compact, refine and accumulate (the default), ``summary_template`` for tree_summarize, a
    ``ChatPromptTemplate`` of the context template as the system's message for a ``ContextChatEngine``.

    What is stored and what is popular is asked for one *tenant*: that of the model, or another one, where calls say so
    (``llm.complete(..., tenant="acme")``): ``StablePrefixOrder(llm=llm, tenant="acme")``.
    """

    llm: SerializeAsAny[LayerStreamLLM] | None = Field(default=None, description="The model whose store is asked.")
    prompt: Any = Field(default=DEFAULT_TEXT_QA_PROMPT_SEL, description="The one that the context goes into.")
    tenant: str | None = Field(default=None, description="Whose questions these are; None: the model's own tenant.")
    learn: bool = Field(default=True, description="Count retrievals, and put what is retrieved often first.")

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "StablePrefixOrder"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        llm = self.llm
        if llm is None:
            return prefix_order(nodes, _canonical)
        engine, template = llm.load(), self.prompt
        tenant = llm.tenant if self.tenant is None else self.tenant

        def write(some: Sequence[NodeWithScore]) -> str:
            return join_nodes(found.node for found in some)

        def render(context: str) -> Any:
            return render_context(llm, template, context, "?")

        def cached_tokens(some: Sequence[NodeWithScore]) -> int:
            return engine.cached_tokens(render(write(some)), tenant=tenant)

        if self.learn:
            return learned_order(engine, nodes, _canonical, write, render, tenant)
        return prefix_order(nodes, _canonical, cached_tokens)


def join_nodes(nodes: Any) -> str:
    """As LlamaIndex's synthesizers put nodes into one context."""
    return "\n\n".join(node.get_content(metadata_mode=MetadataMode.LLM).strip() for node in nodes)


def render_context(llm: LayerStreamLLM, template: BasePromptTemplate, context: str, question: str) -> Any:
    """What the engine would be given."""
    values = {"context_str": context, "query_str": question}
    if llm.metadata.is_chat_model:
        return llm.prompt_for(llm._get_messages(template, **values))
    return llm._get_prompt(template, **values)


def _canonical(found: NodeWithScore) -> tuple[str, int, str, str]:
    """Where a node comes from, and where it stands there."""
    node = found.node
    position = getattr(node, "start_char_idx", None) or 0
    return node.ref_doc_id or "", position, node.get_content(), node.node_id
