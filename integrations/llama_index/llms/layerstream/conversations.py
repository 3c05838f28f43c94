"""In a conversation passages come in behind those that are there, and none comes twice.

A prompt of a later turn then begins as the one before, as far as what stands in front: its KV is found. Retrieving
anew for every turn and replacing the context would have it computed again from the first passage that differs.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from layerstream.api.conversations import Growing


class GrowingContext(BaseNodePostprocessor):
    """The nodes of a conversation so far, and behind them the new ones; the last of a chat engine's postprocessors.

    One object belongs to one conversation, whose turns may come from any thread; :meth:`reset` when it begins anew. It
    holds *most* nodes (1000 where that is ``None``), or as many as one retrieval brought. Behind a
    ``StablePrefixOrder``, which orders what comes in::

        engine = index.as_chat_engine("condense_plus_context", node_postprocessors=[order, GrowingContext(most=12)])

    As a postprocessor of an agent's ``RetrieverTool``, with ``only_new=True``: earlier results are in the conversation
    already, so a result has only nodes that no earlier one has.
    """

    most: int | None = Field(
        default=12, description="Nodes at most; past it the context begins again with the new. None: 1000."
    )
    only_new: bool = Field(
        default=False, description="Return only nodes that were not returned before (of the last 1000)."
    )

    _conversation: Growing[NodeWithScore] = PrivateAttr(default_factory=lambda: Growing(_node_id))

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "GrowingContext"

    def reset(self) -> None:
        """The conversation begins anew."""
        self._conversation.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        kept = (state.get("__pydantic_private__") or {}).get("_conversation")  # LlamaIndex makes a new one
        if kept is not None:
            self._conversation = kept

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._conversation.only_new(nodes) if self.only_new else self._conversation.grow(nodes, self.most)


def _node_id(found: NodeWithScore) -> str:
    return found.node.node_id
