"""The order that only somebody has who knows all questions beforehand: by how many of them bring a node."""

from __future__ import annotations

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle


class ByPopularity(BaseNodePostprocessor):
    """Nodes by *counts*, the most popular first."""

    counts: dict[str, int]

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return sorted(nodes, key=lambda found: (-self.counts[found.node.node_id], found.node.node_id))
