"""Chunks that say where they stand: :class:`ContextualChunks`, a transformation before the index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from langchain_core.documents import BaseDocumentTransformer, Document
from layerstream.situating import INSTRUCTIONS, MAX_TOKENS, Chunked, Situating, rejoin
from pydantic import BaseModel, ConfigDict, field_validator

from langchain_layerstream.documents import check_model


class ContextualChunks(BaseModel, BaseDocumentTransformer):
    """Puts a line in front of each chunk that says what it is about and where in its document it stands.

    ``ContextualChunks(llm=llm, splitter=splitter).transform_documents(documents)`` cuts whole documents and situates
    the chunks. Without a splitter it is given chunks: those of one *source* are one document, which is put together
    from them (exactly, where they have a ``start_index``). Chunks come back in the order given; what was given is left
    as it is.

    All chunks of a document are asked at once, with the document in front: it is computed once, and the lines take
    about as many sweeps as one of them. A document that the context does not hold is shown in windows around each
    chunk. Greedy: the same lines every time.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: Any
    """The model that writes the lines."""
    splitter: Any = None
    """A ``TextSplitter``, if whole documents are given."""
    into: Literal["text", "metadata", "both"] = "text"
    """Where a line goes: in front of the text, so that it is embedded and shown; or under *metadata_key*."""
    metadata_key: str = "context"
    source_key: str = "source"
    """The key of the metadata that says which document a chunk is of."""
    instructions: str = INSTRUCTIONS
    """What the model is asked: ``{document}``, and behind it ``{chunk}``."""
    max_tokens: int = MAX_TOKENS
    """Of a line."""
    _check_llm = field_validator("llm")(check_model)

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """Chunks with their lines. One that fails (the context does not hold it) is left as it is, and the log says so.

        Raises:
            ConfigurationError: *instructions* without the document in front.
        """
        whole = self._split(documents) if self.splitter is not None else self._rejoined(documents)
        cut = list(whole)
        situating = Situating(self.instructions, self.max_tokens)
        lines = situating.lines(self.llm.load(), (chunked for _, chunked in cut), **self.llm._terms({}))
        situated: list[tuple[int, Document]] = []
        for (chunks, _), own in zip(cut, lines, strict=True):
            situated += [(at, self._with(chunk, line)) for (at, chunk), line in zip(chunks, own, strict=True)]
        return [chunk for _, chunk in sorted(situated, key=lambda item: item[0])]

    def _split(self, documents: Sequence[Document]) -> Iterator[tuple[list[tuple[int, Document]], Chunked]]:
        """The numbered chunks of each document, and what they are asked with."""
        number = 0
        for document in documents:
            chunks = self.splitter.split_documents([document])
            numbered = list(enumerate(chunks, number))
            number += len(chunks)
            starts = [chunk.metadata.get("start_index") for chunk in chunks]
            yield numbered, Chunked(document.page_content, [chunk.page_content for chunk in chunks], starts)

    def _rejoined(self, chunks: Sequence[Document]) -> Iterator[tuple[list[tuple[int, Document]], Chunked]]:
        """As :meth:`_split`, of documents that were cut already. A chunk without a source is a document."""
        groups: dict[Any, list[tuple[int, Document]]] = {}
        for number, chunk in enumerate(chunks):
            source = chunk.metadata.get(self.source_key)
            groups.setdefault(number if source is None else str(source), []).append((number, chunk))
        for numbered in groups.values():
            pieces = [(chunk.page_content, chunk.metadata.get("start_index")) for _, chunk in numbered]
            text, starts = rejoin(pieces)
            yield numbered, Chunked(text, [piece for piece, _ in pieces], starts)

    def _with(self, chunk: Document, line: str) -> Document:
        if not line:
            return chunk
        text, metadata = chunk.page_content, chunk.metadata
        if self.into in ("text", "both"):
            text = f"{line}\n\n{text}"
        if self.into in ("metadata", "both"):
            metadata = {**metadata, self.metadata_key: line}
        return chunk.model_copy(update={"page_content": text, "metadata": metadata})
