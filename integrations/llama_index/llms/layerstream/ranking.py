"""``LayerStreamEmbeddings`` and ``LayerStreamReranker``: vectors and scores from a model whose weights stream.

Translation only; :mod:`layerstream.ranking` does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from layerstream.handle import TERMS, EngineHandle, check_fields
from layerstream.ranking.embedder import INSTRUCTION, QUERY_FORM, Embedder
from layerstream.ranking.reranker import Reranker, ranked

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

_AT_ONCE = 256


class LayerStreamEmbeddings(BaseEmbedding):
    """Vectors of texts: final hidden states of a model whose weights stream past the compute.

    For Qwen3-Embedding as it is; for others choose ``pooling`` and ``instruction`` as their cards say. All texts of a
    batch share its sweeps. The model is loaded at first use.

    Example:
        >>> from llama_index.llms.layerstream import LayerStreamEmbeddings
        >>> embeddings = LayerStreamEmbeddings(model="demo")
        >>> len(embeddings.get_text_embedding_batch(["Brenvik is led by Sluba Merkast.", "Rain is wet."]))
        2
    """

    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the engine.")
    pooling: Literal["last", "mean"] = Field(default="last", description="Of the last token, or the mean over all.")
    normalize: bool = Field(default=True, description="Vectors of length 1.")
    instruction: str = Field(default=INSTRUCTION, description="What queries are for; empty: nothing is said.")
    query_form: str = Field(default=QUERY_FORM, description="How an instruction and a query are written.")
    max_tokens: int | None = Field(default=None, description="Of a text; None: as many as the context has.")
    truncate: bool = Field(default=True, description="Leave out the end of a longer text; else that is an error.")
    dimensions: int | None = Field(default=None, description="Numbers of each vector that are kept; None: all.")
    append_eos: bool = Field(default=False, description="Put the EOS behind a text where the tokenizer does not.")
    timeout: float | None = Field(default=None, description="Seconds until what is not finished is given up.")
    priority: int = Field(default=0, description="Where requests wait for each other, more goes first.")
    client: str = Field(default="", description="Whom it is for; clients share the engine fairly.")
    tenant: str = Field(default="", description="Whose it is: no other tenant finds what it left.")

    _handle: EngineHandle = PrivateAttr()

    def __init__(self, model: str | None = None, *, engine: LayerStream | None = None, **fields: Any) -> None:
        given = fields.pop("model_name", None)
        check_fields(type(self).__name__, fields, type(self).model_fields)
        handle = EngineHandle(model or given, fields.get("engine_kwargs"), engine)
        super().__init__(model_name=handle.model, **{"embed_batch_size": _AT_ONCE, **fields})
        self._handle = handle

    def __getstate__(self) -> dict[str, Any]:
        self._handle.__getstate__()  # says it if it cannot be; LlamaIndex would leave it out
        return super().__getstate__()

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "LayerStreamEmbeddings"

    def load(self) -> LayerStream:
        """The engine, loaded if it is not yet."""
        return self._handle.get()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder(self.load()).documents(texts, **_terms(self)).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        embedder = self._embedder(self.load())
        return embedder.documents([embedder.as_query(query)], **_terms(self))[0].tolist()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        embedder = self._embedder(await self._handle.get_async())
        return (await embedder.adocuments(texts, **_terms(self))).tolist()

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        embedder = self._embedder(await self._handle.get_async())
        return (await embedder.adocuments([embedder.as_query(query)], **_terms(self)))[0].tolist()

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


class LayerStreamReranker(BaseNodePostprocessor):
    """Keeps the nodes that are of most use for a query, the best first, with the model's score.

    Qwen3-Reranker and bge-reranker-v2-gemma are asked as they were trained; any other model whether a passage answers
    the query (yes or no). All nodes share the sweeps, so a hundred take little longer than their tokens do.
    """

    model: str = Field(default="", description="Folder, hub id, .gguf file, or demo.")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the engine.")
    top_n: int | None = Field(default=None, ge=1, description="How many are kept; None: all, in order.")
    min_score: float = Field(default=0.0, description="Nodes below it are left out.")
    form: Any = Field(default=None, exclude=True, description="A RerankForm; None: as the model was trained.")
    instruction: str | None = Field(default=None, description="What to look for; None: as the form says.")
    max_tokens: int | None = Field(default=None, description="Of query and passage together; None: the context.")
    truncate: bool = Field(default=True, description="Leave out the end of a longer passage; else an error.")
    metadata_mode: MetadataMode = Field(default=MetadataMode.EMBED, description="Which of a node's metadata is read.")
    timeout: float | None = Field(default=None, description="Seconds until what is not finished is given up.")
    priority: int = Field(default=0, description="Where requests wait for each other, more goes first.")
    client: str = Field(default="", description="Whom it is for; clients share the engine fairly.")
    tenant: str = Field(default="", description="Whose it is: no other tenant finds what it left.")

    _handle: EngineHandle = PrivateAttr()

    def __init__(self, model: str | None = None, *, engine: LayerStream | None = None, **fields: Any) -> None:
        check_fields(type(self).__name__, fields, type(self).model_fields)
        handle = EngineHandle(model, fields.get("engine_kwargs"), engine)
        super().__init__(model=handle.model, **fields)  # type: ignore[call-arg]
        self._handle = handle

    def __getstate__(self) -> dict[str, Any]:
        self._handle.__getstate__()
        return super().__getstate__()

    @classmethod
    def class_name(cls) -> str:
        """Name for serialisation."""
        return "LayerStreamReranker"

    def load(self) -> LayerStream:
        """The engine, loaded if it is not yet."""
        return self._handle.get()

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query, texts = self._asked(nodes, query_bundle)
        return self._ranked(nodes, self._reranker(self.load()).score(query, texts, **_terms(self)))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        query, texts = self._asked(nodes, query_bundle)
        reranker = self._reranker(await self._handle.get_async())
        return self._ranked(nodes, await reranker.ascore(query, texts, **_terms(self)))

    def _asked(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> tuple[str, list[str]]:
        if query_bundle is None:
            raise ValueError("a reranker needs the query: pass query_str= or query_bundle= to postprocess_nodes")
        return query_bundle.query_str, [found.node.get_content(metadata_mode=self.metadata_mode) for found in nodes]

    def _reranker(self, engine: LayerStream) -> Reranker:
        return Reranker(
            engine, self.form, instruction=self.instruction, max_tokens=self.max_tokens, truncate=self.truncate
        )

    def _ranked(self, nodes: list[NodeWithScore], scores: list[float]) -> list[NodeWithScore]:
        best = ranked(nodes, scores, self.top_n, self.min_score)
        return [NodeWithScore(node=node.node, score=score) for node, score in best]


def _terms(fields: Any) -> dict[str, Any]:
    return {name: getattr(fields, name) for name in TERMS}
