"""Nodes are computed when they enter the index, as they will stand in a prompt: :class:`WarmPrefixes`.

What is in an index and what is in a prompt may differ. A sentence is retrieved, and its window is shown; leaves are
retrieved, and their parent is shown; a text template puts metadata in front. :func:`shown_nodes` says what is shown,
from the nodes themselves where that is possible.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.layerstream.base import LayerStreamLLM
from llama_index.llms.layerstream.prefixes import join_nodes, render_context

if TYPE_CHECKING:
    from layerstream.warming import WarmForecast, Warming

logger = logging.getLogger(__name__)

WINDOW_KEY = "window"
MERGE_RATIO = 0.5

FindNode = Callable[[str], BaseNode | None]
"""The node of an id, if it is known."""


class WarmPrefixes(TransformComponent):
    """Computes nodes as they enter the index, so that the first question about one finds its KV.

    The last of an ``IngestionPipeline``'s transformations, or called with nodes; they are returned as they came. What
    is stored already costs nothing, so it can run over everything again.

    Of a sentence-window node the window is computed, which ``MetadataReplacementPostProcessor`` puts in its place. Of
    the leaves of a hierarchy the parents are computed as well, which ``AutoMergingRetriever`` puts in theirs: among the
    nodes that are given, or from *docstore*. Metadata is shown as in every synthesizer: ``MetadataMode.LLM``, the
    node's ``text_template``, without its ``excluded_llm_metadata_keys``.
    """

    llm: SerializeAsAny[LayerStreamLLM] = Field(description="The model that will answer.")
    prompt: Any = Field(default=DEFAULT_TEXT_QA_PROMPT_SEL, description="The one that the context goes into.")
    window_key: str | None = Field(
        default=WINDOW_KEY, description="The metadata key whose text replaces a node's; None: nodes stay as they are."
    )
    docstore: Any = Field(
        default=None, exclude=True, description="A docstore or StorageContext that has the parents of merged leaves."
    )
    merge_ratio: float = Field(
        default=MERGE_RATIO, ge=0, le=1, description="AutoMergingRetriever's simple_ratio_thresh."
    )
    top: int | None = Field(default=None, description="So many of the most popular ones at most.")
    budget: int | str | None = Field(default=None, description="What their KV may take on disk, such as '20GB'.")
    background: bool = Field(default=False, description="Return at once, and compute while nobody asks.")

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """*nodes*, warmed, or in the *background* going to be.

        Raises:
            StorageFull: not even one fits the store or the budget.
            ConfigurationError: no store, or a prompt that puts the question first.
        """
        self.warm(nodes)
        return nodes

    def warm(self, nodes: Sequence[BaseNode]) -> Warming | None:
        """Warm *nodes*; in the *background* its handle is returned, which says how far it is."""
        engine, texts, options = self.llm.load(), self.texts(nodes), self._options()
        if self.background:
            return engine.warm(texts, background=True, **options)
        engine.warm(texts, **options)
        return None

    def forecast(self, nodes: Sequence[BaseNode]) -> WarmForecast:
        """What warming *nodes* would take and bring, without doing it."""
        return self.llm.load().forecast_warm(self.texts(nodes), **self._options())

    def texts(self, nodes: Sequence[BaseNode]) -> list[str]:
        """What is computed: the contexts that prompts will begin with."""
        given = {node.node_id: node for node in nodes}
        docstore = getattr(self.docstore, "docstore", self.docstore)  # of a StorageContext

        def find(node_id: str) -> BaseNode | None:
            found = given.get(node_id)
            return docstore.get_document(node_id, raise_error=False) if found is None and docstore else found

        shown = shown_nodes(nodes, find, self.window_key, self.merge_ratio)
        return list(dict.fromkeys(filter(None, (join_nodes([node]) for node in shown))))

    def _options(self) -> dict[str, Any]:
        return {"top": self.top, "budget": self.budget, "prompt": self._render, "tenant": self.llm.tenant}

    def _render(self, context: str, question: str) -> Any:
        return render_context(self.llm, self.prompt, context, question)


def shown_nodes(
    nodes: Iterable[BaseNode],
    find: FindNode,
    window_key: str | None = WINDOW_KEY,
    merge_ratio: float = MERGE_RATIO,
) -> Iterator[BaseNode]:
    """What stands in prompts for *nodes* that may be retrieved; *nodes* are left as they are.

    A node with a text under *window_key* that is hidden from the model, as ``SentenceWindowNodeParser`` leaves it, is
    shown with that text in its place. A node with parents may be shown as any of them; one that is the only child, or
    one of so few that it alone is more than *merge_ratio* of them, is always merged and never shown itself.
    """
    lost = 0
    seen: set[str] = set()
    for node in nodes:
        line = [node]
        while (about := line[-1].parent_node) is not None:
            parent = find(about.node_id)
            if parent is None:
                lost += 1
                break
            line.append(parent)
        for at, shown in enumerate(line):
            parent = line[at + 1] if at + 1 < len(line) else None
            if shown.node_id not in seen and not (parent and 1 / len(parent.child_nodes or [0]) > merge_ratio):
                seen.add(shown.node_id)
                yield _with_window(shown, window_key)
    if lost:
        logger.warning(
            "%d nodes have parents that are not here, so what AutoMergingRetriever puts in their place is not warmed: "
            "give WarmPrefixes the docstore= that has them",
            lost,
        )


def _with_window(node: BaseNode, window_key: str | None) -> BaseNode:
    window = None if window_key is None else node.metadata.get(window_key)
    if not isinstance(window, str) or window_key not in node.excluded_llm_metadata_keys:
        return node
    shown = node.model_copy()
    shown.set_content(window)
    return shown
