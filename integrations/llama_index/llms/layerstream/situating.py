"""Chunks that say where they stand: :class:`ContextualChunks`, a transformation behind a splitter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.llms.layerstream.base import LayerStreamLLM

from layerstream.handle import TERMS
from layerstream.situating import INSTRUCTIONS, MAX_TOKENS, Chunked, Situating, rejoin


class ContextualChunks(TransformComponent):
    """Gives each node a line that says what it is about and where in its document it stands.

    In an ``IngestionPipeline`` it goes between the splitter and the embedding. Nodes of one document are those with the
    same ``ref_doc_id``; the document is put together from them (exactly, where they have a ``start_char_idx``). The
    nodes that were given are left as they are.

    All nodes of a document are asked at once, with the document in front: it is computed once, and the lines take
    about as many sweeps as one of them. A document that the context does not hold is shown in windows around each
    node. Greedy: the same lines every time.
    """

    llm: SerializeAsAny[LayerStreamLLM] = Field(description="The model that writes the lines.")
    into: Literal["metadata", "text", "both"] = Field(
        default="metadata", description="Where a line goes: metadata is embedded and shown, or in front of the text."
    )
    metadata_key: str = Field(default="context", description="Its key in the metadata.")
    instructions: str = Field(default=INSTRUCTIONS, description="What is asked: {document}, and behind it {chunk}.")
    max_tokens: int = Field(default=MAX_TOKENS, description="Of a line at most.")

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """*nodes* with their lines, in the order given. One that fails (the context does not hold it) is left as it
        is, and the log says so.

        Raises:
            ConfigurationError: *instructions* without the document in front.
        """
        situating = Situating(self.instructions, self.max_tokens)
        groups: dict[str, list[int]] = {}
        for number, node in enumerate(nodes):
            groups.setdefault(node.ref_doc_id or node.node_id, []).append(number)
        situated = list(nodes)
        terms = {name: getattr(self.llm, name) for name in TERMS}
        documents = (self._chunked([nodes[number] for number in numbers]) for numbers in groups.values())
        lines = situating.lines(self.llm.load(), documents, **terms)
        for numbers, own in zip(groups.values(), lines, strict=True):
            for number, line in zip(numbers, own, strict=True):
                situated[number] = self._with(nodes[number], line)
        return situated

    @staticmethod
    def _chunked(nodes: Sequence[BaseNode]) -> Chunked:
        pieces = [(node.get_content(MetadataMode.NONE), getattr(node, "start_char_idx", None)) for node in nodes]
        text, starts = rejoin(pieces)
        return Chunked(text, [piece for piece, _ in pieces], starts)

    def _with(self, node: BaseNode, line: str) -> BaseNode:
        if not line:
            return node
        metadata = node.metadata
        if self.into in ("metadata", "both"):
            metadata = {**metadata, self.metadata_key: line}
        made = node.model_copy(update={"metadata": metadata})
        if self.into in ("text", "both"):
            made.set_content(f"{line}\n\n{node.get_content(MetadataMode.NONE)}")
        return made
