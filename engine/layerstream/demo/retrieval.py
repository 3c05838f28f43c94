"""From a folder of documents to the passages that a question is about. No framework: BM25, paragraphs, text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerstream.demo.reading import SUFFIXES, Unreadable, import_extra, read_text
from layerstream.errors import DocumentError

logger = logging.getLogger(__name__)

MOST_NAMED = 10
PASSAGE_CHARACTERS = 1500  # about 400 tokens of English


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


def load_documents(folder: Path, say: Callable[[str], object] = logger.warning) -> list[Document]:
    """The text, Markdown and PDF files in *folder* and below, by name; or the one file that *folder* is.

    A file that cannot be read does not stand in the way of the others.

    Args:
        say: told in one line which files were skipped, and why, if any were.

    Raises:
        DocumentError: no such folder, or nothing in it that can be read.
        MissingExtra: there is a PDF, and pypdf is not installed.
    """
    if not folder.exists():
        raise DocumentError(f"{folder}: no such folder; pass a folder of txt, md or pdf files")
    documents, skipped = _read_all(folder)
    if not documents:
        said = f": {_list(skipped)}" if skipped else "; pass a folder that has some"
        raise DocumentError(f"{folder}: no txt, md or pdf file with text in it{said}")
    if skipped:
        read = "1 file" if len(documents) == 1 else f"{len(documents)} files"
        say(f"{read} read, {len(skipped)} skipped: {_list(skipped)}")
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

    Args:
        limit: characters of a passage.

    Raises:
        MissingExtra: bm25s is not installed.
    """

    def __init__(self, documents: Iterable[Document], limit: int = PASSAGE_CHARACTERS) -> None:
        self.passages: Sequence[Passage] = [part for document in documents for part in split_passages(document, limit)]
        self._bm25s = import_extra("bm25s")
        self._index = self._bm25s.BM25()
        # A file's name often says what it is about.
        texts = [f"{_words(passage.document)}\n{passage.text}" for passage in self.passages]
        self._index.index(self._tokens(texts), show_progress=False)

    def retrieve(self, question: str, count: int = 3) -> list[Passage]:
        """At most *count* passages that share a word with *question*, best first."""
        count = min(count, len(self.passages))
        ranks, scores = self._index.retrieve(self._tokens([question]), k=count, show_progress=False)
        return [self.passages[rank] for rank, score in zip(ranks[0], scores[0], strict=True) if score > 0]

    def opening(self, count: int = 3) -> list[Passage]:
        """The first *count* passages, what documents begin with before what goes on: for questions about the whole.

        "What is this about?" shares no word with what it is about.
        """
        return sorted(self.passages, key=lambda passage: (passage.index, passage.document))[:count]

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        return self._bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def _read_all(folder: Path) -> tuple[list[Document], dict[str, str]]:
    """The documents, and the files that were skipped with the reasons."""
    root = folder if folder.is_dir() else folder.parent
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    documents, skipped = [], {}
    for path in paths:
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name = path.relative_to(root).as_posix()
            try:
                documents.append(Document(name, read_text(path)))
            except Unreadable as reason:
                skipped[name] = str(reason)
    return documents, skipped


def _list(skipped: Mapping[str, str]) -> str:
    """The first few by name; a line has an end."""
    shown = [f"{name} {reason}" for name, reason in list(skipped.items())[:MOST_NAMED]]
    rest = len(skipped) - len(shown)
    return "; ".join([*shown, *([f"and {rest} more"] if rest else [])])


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


def _words(name: str) -> str:
    return re.sub(r"[\W_]+", " ", Path(name).stem)
