"""``LayerStreamEmbeddings`` and ``LayerStreamReranker``: vectors and scores from a model whose weights stream.

Translation only; :mod:`layerstream.ranking` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from layerstream.ranking.embedder import INSTRUCTION, QUERY_FORM, Embedder
from layerstream.ranking.reranker import Reranker, ranked
from pydantic import Field

from langchain_layerstream._source import EngineSource

if TYPE_CHECKING:
    from layerstream.engine import LayerStream


class LayerStreamEmbeddings(EngineSource, Embeddings):
    """Vectors of texts: final hidden states of a model whose weights stream past the compute.

    For Qwen3-Embedding as it is; for others choose ``pooling`` and ``instruction`` as their cards say. All texts of a
    call share its sweeps. The model is loaded at first use.

    Example:
        >>> from langchain_layerstream import LayerStreamEmbeddings
        >>> embeddings = LayerStreamEmbeddings(model="demo")
        >>> vectors = embeddings.embed_documents(["Brenvik is led by Sluba Merkast.", "Rain is wet."])
        >>> len(vectors), round(sum(number * number for number in vectors[0]), 3)
        (2, 1.0)
    """

    pooling: Literal["last", "mean"] = "last"
    """Of the last token, or the mean over all."""
    normalize: bool = True
    """Vectors of length 1."""
    instruction: str = INSTRUCTION
    """What queries are for; documents have none. Empty: queries are embedded as documents are."""
    query_form: str = QUERY_FORM
    """How an instruction and a query are written."""
    max_tokens: int | None = None
    """Of a text; ``None``: as many as the context has."""
    truncate: bool = True
    """Leave out the end of a longer text; else that is an error."""
    dimensions: int | None = None
    """Numbers of each vector that are kept, for models trained so; ``None``: all."""
    append_eos: bool = False
    """Put the EOS token behind every text, where the tokenizer does not."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each of *texts*.

        Raises:
            PromptTooLong: with ``truncate=False``, a text that the context has no room for.
        """
        return self._embedder(self.load()).documents(texts, **self._own_terms()).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query, with the instruction before it."""
        embedder = self._embedder(self.load())
        return embedder.documents([embedder.as_query(text)], **self._own_terms())[0].tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As :meth:`embed_documents`, without blocking the event loop."""
        embedder = self._embedder(await self._handle.get_async())
        return (await embedder.adocuments(texts, **self._own_terms())).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """As :meth:`embed_query`, without blocking the event loop."""
        embedder = self._embedder(await self._handle.get_async())
        return (await embedder.adocuments([embedder.as_query(text)], **self._own_terms()))[0].tolist()

    def _own_terms(self) -> dict[str, Any]:
        return self._terms(self._configured())

    def _embedder(self, engine: LayerStream) -> Embedder:
        return Embedder(
            engine,
            pooling=self.pooling,
            normalize=self.normalize,
            instruction=self.instruction,
            query_form=self.query_form,
            max_tokens=self.max_tokens,
            truncate=self.truncate,
            dimensions=self.dimensions,
            append_eos=self.append_eos,
        )


class LayerStreamReranker(EngineSource, BaseDocumentCompressor):
    """Keeps the documents that are of most use for a query, the best first, with ``relevance_score`` in their metadata.

    Qwen3-Reranker and bge-reranker-v2-gemma are asked as they were trained; any other model whether a passage answers
    the query (yes or no). All documents share the sweeps, so a hundred take little longer than their tokens do.

    Example:
        >>> from langchain_core.documents import Document
        >>> from langchain_layerstream import LayerStreamReranker
        >>> reranker = LayerStreamReranker(model="demo", top_n=1)
        >>> documents = [Document("Brenvik is led by Sluba Merkast."), Document("Rain is wet.")]
        >>> len(reranker.compress_documents(documents, "Who leads Brenvik?"))
        1
    """

    top_n: int | None = Field(default=None, ge=1)
    """How many are kept; ``None``: all, in order."""
    min_score: float = 0.0
    """Documents below it are left out."""
    form: Any = None
    """A :class:`layerstream.ranking.forms.RerankForm`; ``None``: as the model was trained, by its name."""
    instruction: str | None = None
    """What to look for; ``None``: as the form says."""
    max_tokens: int | None = None
    """Of query and passage together; ``None``: as many as the context has."""
    truncate: bool = True
    """Leave out the end of a longer passage; else that is an error."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The best of *documents* for *query*."""
        texts = [document.page_content for document in documents]
        return self._ranked(documents, self._reranker(self.load()).score(query, texts, **self._own_terms()))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """As :meth:`compress_documents`, without blocking the event loop."""
        texts = [document.page_content for document in documents]
        reranker = self._reranker(await self._handle.get_async())
        return self._ranked(documents, await reranker.ascore(query, texts, **self._own_terms()))

    def _own_terms(self) -> dict[str, Any]:
        return self._terms(self._configured())

    def _reranker(self, engine: LayerStream) -> Reranker:
        return Reranker(
            engine,
            self.form,
            instruction=self.instruction,
            max_tokens=self.max_tokens,
            truncate=self.truncate,
        )

    def _ranked(self, documents: Sequence[Document], scores: Sequence[float]) -> list[Document]:
        return [
            document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})
            for document, score in ranked(documents, scores, self.top_n, self.min_score)
        ]
