"""Documents are computed when they enter the index, as they will stand in a prompt: :class:`WarmPrefixes`.

What is in an index and what is in a prompt may differ: a retriever of parents finds small chunks and returns what they
were cut from. So what is warmed is what the retriever returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import BaseDocumentTransformer, Document
from layerstream.errors import ConfigurationError
from pydantic import Field, field_validator

from langchain_layerstream.documents import ContextPrompt, check_model

if TYPE_CHECKING:
    from layerstream.warming import WarmForecast, Warming

_AT_A_TIME = 1000  # keys of a docstore


class WarmPrefixes(ContextPrompt, BaseDocumentTransformer):
    """Computes documents as they enter the index, so that the first question about one finds its KV.

    ``vector_store.add_documents(WarmPrefixes(llm=llm, prompt=prompt).transform_documents(chunks))``: the documents are
    returned as they came. What is stored already costs nothing, so it can run over everything again.

    With a ``ParentDocumentRetriever`` (or another ``MultiVectorRetriever``), ``WarmPrefixes(docstore=
    retriever.docstore)`` computes the parents: :meth:`warm_docstore` all of them, ``transform_documents`` those of the
    children that it is given.
    """

    llm: Any
    """The model that will answer."""
    docstore: Any = Field(default=None, exclude=True)
    """Where the retriever has the documents that it returns."""
    id_key: str = "doc_id"
    """The key of a child's metadata under which its parent's id is."""
    top: int | None = None
    """So many of the most popular ones at most."""
    budget: int | str | None = None
    """What their KV may take on disk, such as ``"20GB"``."""
    background: bool = False
    """Return at once, and compute while nobody asks."""
    _check_llm = field_validator("llm")(check_model)

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """*documents*, warmed, or in the *background* going to be.

        Raises:
            StorageFull: not even one fits the store or the budget.
            ConfigurationError: no store, or a prompt that puts the question first.
        """
        self.warm(documents)
        return documents

    def warm(self, documents: Sequence[Document]) -> Warming | None:
        """Warm *documents*; in the *background* its handle is returned, which says how far it is."""
        return self._warm(self.texts(documents))

    def warm_docstore(self) -> Warming | None:
        """As :meth:`warm`, all that the *docstore* has."""
        return self._warm(self._written(self._stored()))

    def forecast(self, documents: Sequence[Document] | None = None) -> WarmForecast:
        """What warming *documents* (``None``: all of the *docstore*) would take and bring, without doing it."""
        texts = self._written(self._stored()) if documents is None else self.texts(documents)
        return self.llm.load().forecast_warm(texts, **self._options())

    def texts(self, documents: Sequence[Document]) -> list[str]:
        """What is computed: the contexts that prompts will begin with.

        A child of which the docstore has no parent is never returned by the retriever, so it is left out.
        """
        if self.docstore is None:
            return self._written(documents)
        ids = dict.fromkeys(document.metadata[self.id_key] for document in documents if self._is_child(document))
        parents = dict(zip(ids, self.docstore.mget(list(ids)), strict=True))
        shown = (parents[d.metadata[self.id_key]] if self._is_child(d) else d for d in documents)
        return self._written([document for document in shown if document is not None])

    def _is_child(self, document: Document) -> bool:
        return self.id_key in document.metadata

    def _stored(self) -> list[Document]:
        if self.docstore is None:
            raise ConfigurationError("there is no docstore: WarmPrefixes(docstore=retriever.docstore)")
        keys = list(self.docstore.yield_keys())
        found = [self.docstore.mget(keys[at : at + _AT_A_TIME]) for at in range(0, len(keys), _AT_A_TIME)]
        return [document for some in found for document in some if document is not None]

    def _written(self, documents: Sequence[Document]) -> list[str]:
        return list(dict.fromkeys(self._join([document]) for document in documents))

    def _warm(self, texts: list[str]) -> Warming | None:
        engine, options = self.llm.load(), self._options()
        if self.background:
            return engine.warm(texts, background=True, **options)
        engine.warm(texts, **options)
        return None

    def _options(self) -> dict[str, Any]:
        return {"top": self.top, "budget": self.budget, "prompt": self._shape, "tenant": self.llm.tenant}

    def _shape(self, context: str, question: str) -> Any:
        return self._render(self.llm, context, question)
