"""Text that knows which of its characters a chat template wrote, and which were said to it.

A rendered prompt is one text, and in it the template's own ``<|eot|>`` and one that a document brings look alike. So
what a template is given goes in as :class:`Traced` text, and what comes out still knows. Invariants: a traced text is
equal to the plain one in all that a template can ask of it; ``_origin`` has a character for each of its characters,
:data:`WRITTEN` or :data:`SAID`; what follows from both kinds together, character by character, keeps both apart; where
an operation is not known here, all that comes of it counts as said (:func:`as_said`), never as written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

WRITTEN, SAID = "w", "s"


class Traced(str):
    """Text, and the origin of each of its characters; without one, all of it was said."""

    _origin: str

    def __new__(cls, text: str, origin: str | None = None) -> Traced:
        self = super().__new__(cls, text)
        self._origin = SAID * len(self) if origin is None else origin
        return self

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        return Traced(super().__getitem__(key), self._origin[key])

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return join("", (self, other))

    def __radd__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return join("", (other, self))

    def __mul__(self, count: SupportsIndex) -> Traced:
        return Traced(super().__mul__(count), self._origin * count)

    def __rmul__(self, count: SupportsIndex) -> Traced:
        return self * count

    def strip(self, characters: str | None = None, /) -> Traced:
        """As of any text."""
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: str | None = None, /) -> Traced:
        """As of any text."""
        return self[len(self) - len(super().lstrip(characters)) :]

    def rstrip(self, characters: str | None = None, /) -> Traced:
        """As of any text."""
        return self[: len(super().rstrip(characters))]

    def removeprefix(self, prefix: str, /) -> Traced:
        """As of any text."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> Traced:
        """As of any text."""
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As of any text."""
        return self._pieces(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As of any text."""
        return self._pieces(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As of any text."""
        whole = self._pieces(super().splitlines(True), "")
        return whole if keepends else [line[: len(str.splitlines(line)[0])] for line in whole]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As of any text."""
        first, second, third = self._pieces(super().partition(sep), "")
        return first, second, third

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As of any text."""
        first, second, third = self._pieces(super().rpartition(sep), "")
        return first, second, third

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:  # type: ignore[override]
        """As of any text."""
        if not old:
            return Traced(super().replace(old, new, count))
        return join(new, self.split(old, count))

    def join(self, parts: Iterable[str], /) -> str:
        """As of any text."""
        return join(self, parts)

    def upper(self) -> Traced:
        """As of any text."""
        return self._recased(super().upper())

    def lower(self) -> Traced:
        """As of any text."""
        return self._recased(super().lower())

    def title(self) -> Traced:
        """As of any text."""
        return self._recased(super().title())

    def capitalize(self) -> Traced:
        """As of any text."""
        return self._recased(super().capitalize())

    def _recased(self, text: str) -> Traced:
        return Traced(text, self._origin if len(text) == len(self) else None)

    def _pieces(self, pieces: Iterable[str], separator: str | None) -> list[str]:
        """*pieces* of this text, in order: apart by *separator*, or by whitespace where it is ``None``."""
        found, at = [], 0
        for piece in pieces:
            if separator is None:
                at = self.find(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(separator or "")
        return found


def origin_of(text: str) -> str:
    """Where each character of *text* is from; what is not traced was written."""
    return text._origin if isinstance(text, Traced) else WRITTEN * len(text)


def join(separator: str, parts: Iterable[Any]) -> Any:
    """*parts* as one text; a plain one, if nothing in it is traced."""
    texts = list(map(text_of, parts))
    if not isinstance(separator, Traced) and not any(isinstance(text, Traced) for text in texts):
        return separator.join(texts)
    return Traced(str.join(separator, texts), origin_of(separator).join(map(origin_of, texts)))


def text_of(value: Any) -> str:
    """*value* as it is printed."""
    if isinstance(value, str):
        return value
    return Traced(str(value)) if holds_said(value) else str(value)


def holds_said(value: Any) -> bool:
    """Whether something in *value* was said."""
    if isinstance(value, str):
        return isinstance(value, Traced) and SAID in value._origin
    if isinstance(value, dict):
        return any(holds_said(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(holds_said, value))
    return False


def as_said(value: Any) -> Any:
    """*value*, a JSON-like one, with all of its texts traced as said."""
    if isinstance(value, str):
        return Traced(value)
    if isinstance(value, dict):
        return {as_said(key): as_said(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_said, value))
    return value
