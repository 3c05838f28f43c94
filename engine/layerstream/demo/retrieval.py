"""From a folder of documents to the passages that a question is about. No framework: BM25, paragraphs, text."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.errors import DocumentError, MissingExtra

PASSAGE_CHARACTERS = 1500  # about 400 tokens of English
TEXT_SUFFIXES = frozenset({".txt", ".md", ".markdown"})


@dataclass(frozen=True, slots=True)
class Document:
    """A file's text under the name it has within its folder."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, order=True)
class Passage:
    """Paragraphs of one document that are retrieved together; ``index`` counts them from 0."""

    document: str
    index: int
    text: str


def load_documents(folder: Path) -> list[Document]:
    """The text, Markdown and PDF files in *folder* and below, by name; or the one file that *folder* is.

    Raises:
        DocumentError: no such folder, nothing in it, or a file that cannot be read.
        MissingExtra: there is a PDF, and pypdf is not installed.
    """
    if not folder.exists():
        raise DocumentError(f"{folder}: no such folder; pass a folder of txt, md or pdf files")
    root = folder if folder.is_dir() else folder.parent
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    readable = [path for path in paths if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES | {".pdf"}]
    documents = [Document(path.relative_to(root).as_posix(), _read(path)) for path in readable]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DocumentError(f"{folder}: no txt, md or pdf file with text in it; pass a folder that has some")
    return documents


def split_passages(document: Document, limit: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """Whole paragraphs, as many together as fit *limit* characters; a longer paragraph is cut between words."""
    texts: list[str] = []
    for piece in _pieces(document.text, limit):
        if texts and len(texts[-1]) + 2 + len(piece) <= limit:
            texts[-1] += "\n\n" + piece
        else:
            texts.append(piece)
    return [Passage(document.name, index, text) for index, text in enumerate(texts)]


def join_passages(passages: Iterable[Passage]) -> str:
    """The context of a prompt: passages in the order of their documents, whatever their rank.

    The same passages then make the same context, and its KV can be used again.
    """
    return "\n\n".join(passage.text for passage in sorted(passages))


class Retriever:
    """BM25 over passages.

    Raises:
        MissingExtra: bm25s is not installed.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.passages: Sequence[Passage] = [part for document in documents for part in split_passages(document)]
        self._bm25s = _import("bm25s", "documents")
        self._index = self._bm25s.BM25()
        # A file's name often says what it is about.
        texts = [f"{_words(passage.document)}\n{passage.text}" for passage in self.passages]
        self._index.index(self._tokens(texts), show_progress=False)

    def retrieve(self, question: str, count: int = 3) -> list[Passage]:
        """At most *count* passages that share a word with *question*, best first."""
        count = min(count, len(self.passages))
        ranks, scores = self._index.retrieve(self._tokens([question]), k=count, show_progress=False)
        return [self.passages[rank] for rank, score in zip(ranks[0], scores[0], strict=True) if score > 0]

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        return self._bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def _pieces(text: str, limit: int) -> Iterable[str]:
    """Paragraphs, or parts of those longer than *limit*."""
    for paragraph in re.split(r"\n\s*\n", text):
        rest = paragraph.strip()
        while len(rest) > limit:
            cut = rest.rfind(" ", 1, limit + 1)
            cut = limit if cut < 0 else cut
            yield rest[:cut].rstrip()
            rest = rest[cut:].lstrip()
        if rest:
            yield rest


def _read(path: Path) -> str:
    try:
        if path.suffix.lower() == ".pdf":
            return _read_pdf(path)
        return path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_pdf(path: Path) -> str:
    pypdf = _import("pypdf", "documents")
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except pypdf.errors.PyPdfError as error:
        raise DocumentError(f"{path} is no PDF that can be read: {error}; take it out of the folder") from error
    return "\n\n".join(pages)


def _words(name: str) -> str:
    return re.sub(r"[\W_]+", " ", Path(name).stem)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(module, extra) from error
