"""From a file to its text, or to the reason why there is none. Files are hostile: whatever they hold, that is all."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerstream.errors import MissingExtra

TEXT_SUFFIXES = frozenset({".txt", ".md", ".markdown"})
SUFFIXES = TEXT_SUFFIXES | {".pdf"}

_WESTERN = "cp1252"  # Latin-1 with quotation marks: the right one of several that fit a short text as well


class Unreadable(Exception):
    """A file without text that can be read; the message goes on behind the file's name."""


def read_text(path: Path) -> str:
    """The text of a text, Markdown or PDF file.

    Raises:
        Unreadable: why there is none.
        MissingExtra: a package that reads it is not installed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise Unreadable("is empty")
    text = read_pdf(path) if path.suffix.lower() == ".pdf" else decode(data)
    if not text.strip():
        raise Unreadable("is empty")
    return text


def decode(data: bytes) -> str:
    """Text in UTF-8, else in the encoding that fits it best.

    Raises:
        Unreadable: it is no text.
    """
    text = data.decode("utf-8-sig", errors="replace")
    num_wrong = text.count("\ufffd")
    num_right = sum(character > "\x7f" for character in text) - num_wrong
    if "\0" not in text and num_right >= num_wrong:  # damaged in places, it is still UTF-8
        return text
    matches = import_extra("charset_normalizer").from_bytes(data)
    best = matches.best()
    if best is None:
        raise Unreadable("is binary, no text")
    as_good = [match for match in matches if (match.chaos, -match.coherence) <= (best.chaos, -best.coherence)]
    text = str(next((match for match in as_good if _WESTERN in match.could_be_from_charset), best))
    if "\0" in text:
        raise Unreadable("is binary, no text")
    return text.removeprefix("\ufeff")


def read_pdf(path: Path) -> str:
    """The text of a PDF's pages.

    Raises:
        Unreadable: broken, encrypted, or pictures of pages.
    """
    pypdf = import_extra("pypdf")
    with _silenced("pypdf"):
        try:
            reader = pypdf.PdfReader(path)
            texts = [page.extract_text() for page in reader.pages]
            is_scan = not "".join(texts).strip() and any(len(page.images) for page in reader.pages)
        except pypdf.errors.FileNotDecryptedError as error:
            raise Unreadable("is encrypted: save it without its password") from error
        except pypdf.errors.DependencyError as error:
            raise Unreadable("is encrypted: pip install cryptography to read it, or save it without") from error
        except Exception as error:  # a broken file makes a parser raise whatever its code trips over
            raise Unreadable(f"is no PDF that can be read ({str(error)[:100] or type(error).__name__})") from error
    if is_scan:
        raise Unreadable("is a scan, pages without text: let a text recogniser run over it")
    return "\n\n".join(texts)


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Within it, a library's logger and its children say nothing: what they know is in the reason."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def import_extra(module: str) -> Any:
    """A module of the extra for documents.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(module, "documents") from error
