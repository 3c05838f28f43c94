"""Whatever a retriever of this process returns is noted, so that it is found again in prompts (``reuse="anywhere"``).

LlamaIndex tells its event handlers what a retriever found. So nothing has to be passed along.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index_instrumentation import get_dispatcher

from layerstream.text.passages import SEEN

_WINDOW = "window"  # what a sentence is replaced by, as SentenceWindowNodeParser calls it


class _Listener(BaseEventHandler):
    """Hears what retrievers find."""

    @classmethod
    def class_name(cls) -> str:
        """As the framework asks."""
        return "LayerStreamRetrieved"

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Something happened."""
        if isinstance(event, RetrievalEndEvent):
            SEEN.add(text for node in event.nodes for text in _texts(node))


def _texts(node: NodeWithScore) -> Iterator[str]:
    """What may stand in a prompt for *node*."""
    yield node.get_content(MetadataMode.LLM)
    yield node.get_content(MetadataMode.NONE)
    window = node.metadata.get(_WINDOW)
    if isinstance(window, str):
        yield window


@functools.cache
def watch_retrievers() -> None:
    """Have what retrievers find noted from now on. Idempotent."""
    get_dispatcher().add_event_handler(_Listener())
