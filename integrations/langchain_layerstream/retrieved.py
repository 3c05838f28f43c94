"""Whatever a retriever of this process returns is noted, so that it is found again in prompts (``reuse="anywhere"``).

LangChain tells callbacks what a retriever found, and a model what its prompt is; in between, a chain writes the one
into the other. So nothing has to be passed along: a handler that LangChain adds to every run hears of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.tracers.context import register_configure_hook
from layerstream.text.passages import SEEN

from langchain_layerstream._config import configured_terms


class _Listener(BaseCallbackHandler):
    """Hears what retrievers find."""

    run_inline = True  # before the run goes on: the model is asked next

    def on_retriever_end(self, documents: Sequence[Document], **kwargs: Any) -> None:
        """*documents* were found, for the tenant that the chain's config names."""
        tenant = configured_terms().get("tenant", "")
        SEEN.add((document.page_content for document in documents), tenant if isinstance(tenant, str) else "")


_LISTENER: ContextVar[Any] = ContextVar("layerstream_retrieved", default=_Listener())  # noqa: B039  # one for all


@functools.cache
def watch_retrievers() -> None:
    """Have what retrievers find noted from now on. Idempotent."""
    register_configure_hook(_LISTENER, inheritable=True)
