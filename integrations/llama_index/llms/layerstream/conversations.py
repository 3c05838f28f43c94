"""In a conversation passages come in behind those that are there, and none comes twice.

A prompt of a later turn then begins as the one before, as far as what stands in front: its KV is found. Retrieving
anew for every turn and replacing the context would have it computed again from the first passage that differs.
"""

from __future__ import annotations

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from layerstream.api.prefix_order import append_new


class GrowingContext(BaseNodePostprocessor):
    """The nodes of a conversation so far, and behind them the new ones; the last of a chat engine's postprocessors.

    One object belongs to one conversation; :meth:`reset` when it begins anew. Behind a ``StablePrefixOrder``, which
    orders what comes in::

        engine = index.as_chat_engine("condense_plus_context", node_postprocessors=[order, GrowingContext(most=12)])

    As a postprocessor of an agent's ``RetrieverTool``, with ``only_new=True``: earlier results are in the conversation
    already, so a result has only nodes that no earlier one has.
    """

    most: int | None = Field(default=12, description="Nodes at most; past it the context begins again with the new.")
    only_new: bool = Field(default=False, description="Return only nodes that were not returned before.")

    _nodes: list[NodeWithScore] = PrivateAttr(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "GrowingContext"

    def reset(self) -> None:
        """The conversation begins anew."""
        self._nodes = []

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        known = {found.node.node_id for found in self._nodes} if self.only_new else set()
        most = None if self.only_new else self.most
        self._nodes = append_new(self._nodes, nodes, lambda found: found.node.node_id, most)
        return [found for found in self._nodes if found.node.node_id not in known]
