"""Passages in prompts: which tokens of a prompt are a text that stands in other prompts as well. Pure.

::

    prompt = compose("Use this context.\\n\\n", Passage(first), "\\n\\n", Passage(second), "\\n\\nQuestion: When?")
    engine.generate(prompt)
    engine.generate(text, passages=[first, second])  # the same, of a prompt that somebody else wrote

A text's first and last token may melt into what stands beside it, so a passage is what lies between them: that is the
same tokens wherever it stands.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from layerstream.core.passages import HEAD_TOKENS

EDGE = 1
"""Tokens at either end of a text that may depend on what stands beside it."""
LEAST_TOKENS = 48
"""Of a passage: fewer are computed sooner than they are moved and corrected."""
MOST_HEADS = 64
MOST_TENANTS = 1024
MOST_SEEN = 2048
MOST_CHARACTERS = 2**24
LEAST_HEAD = 8
"""Tokens that two prompts of a kind have in common at least."""


class Passage(str):
    """A text that stands in other prompts as well, perhaps elsewhere in them."""

    __slots__ = ()


class Composed(str):
    """A text that knows its passages; see :func:`compose`."""

    passages: tuple[str, ...] = ()


def compose(*parts: str) -> Composed:
    """*parts* as one text, which knows those that are a :class:`Passage`."""
    text = Composed("".join(parts))
    text.passages = tuple(
        passage
        for part in parts
        for passage in (
            part.passages if isinstance(part, Composed) else [str(part)] if isinstance(part, Passage) else ()
        )
    )
    return text


def passages_in(prompt: Any) -> list[str]:
    """What *prompt*, or the contents of its messages, know of their passages."""
    if isinstance(prompt, Composed):
        return list(prompt.passages)
    if isinstance(prompt, Passage):
        return [str(prompt)]
    if isinstance(prompt, Mapping):
        return passages_in(prompt.get("content"))
    if isinstance(prompt, list | tuple):
        return [passage for item in prompt if not isinstance(item, int) for passage in passages_in(item)]
    return []


def words_of(prompt: Any) -> str:
    """The text of *prompt*, a text or messages; of token ids nothing."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return words_of(prompt.get("content"))
    if isinstance(prompt, list | tuple):
        return "\0".join(words_of(item) for item in prompt if not isinstance(item, int))
    return ""


class SeenTexts:
    """Texts that were retrieved of late, in this process: what may stand in a prompt as a passage. Any thread.

    Frameworks say what they retrieve before they write it into a prompt. One tenant's are not looked for in another's
    prompts: that would tell what was retrieved.
    """

    def __init__(self, most: int = MOST_SEEN, most_characters: int = MOST_CHARACTERS) -> None:
        self._lock = threading.Lock()
        self._texts: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._most = most
        self._characters_left = most_characters

    def add(self, texts: Iterable[str], tenant: str = "") -> None:
        """*texts* were retrieved for *tenant*; the ones that were longest ago are forgotten."""
        with self._lock:
            for text in filter(None, (text.strip() for text in texts)):
                if (tenant, text) not in self._texts:
                    self._characters_left -= len(text)
                self._texts[tenant, text] = None
                self._texts.move_to_end((tenant, text))
            while self._texts and (len(self._texts) > self._most or self._characters_left < 0):
                (_, text), _ = self._texts.popitem(last=False)
                self._characters_left += len(text)

    def within(self, prompt: Any, tenant: str = "") -> list[str]:
        """*tenant*'s that stand in *prompt*; of two of which one is part of the other, the longer one first."""
        words = words_of(prompt)
        with self._lock:
            texts = [text for whose, text in self._texts if whose == tenant] if words else []
        return sorted((text for text in texts if text in words), key=len, reverse=True)


SEEN = SeenTexts()
"""What the integrations of this process have seen retrieved."""


def find_passages(
    token_ids: Sequence[int], texts: Iterable[str], encode: Callable[[str], Sequence[int]]
) -> list[tuple[int, int]]:
    """Where *texts* stand in a prompt, without their edges: ``(start, stop)``, in order and apart.

    Those that are short, or are not there token by token, are left out; of those that overlap the first one counts.
    """
    haystack = array("q", token_ids).tobytes()
    width = array("q").itemsize
    found: list[tuple[int, int]] = []
    for text in dict.fromkeys(texts):
        inner = list(encode(text))[EDGE:-EDGE]
        if len(inner) >= LEAST_TOKENS:
            needle = array("q", inner).tobytes()
            found += ((at, at + len(inner)) for at in _occurrences(haystack, needle, width))
    apart: list[tuple[int, int]] = []
    for start, stop in sorted(found, key=lambda place: (place[0], -place[1])):
        if not apart or start >= apart[-1][1]:
            apart.append((start, stop))
    return apart


def _occurrences(haystack: bytes, needle: bytes, width: int) -> Iterator[int]:
    at = haystack.find(needle)
    while at >= 0:
        if at % width == 0:
            yield at // width
            at = haystack.find(needle, at + len(needle))
        else:
            at = haystack.find(needle, at + 1)


class Heads:
    """What prompts of a kind begin with: the head of contexts of their own. Any thread.

    The head has to be the same from prompt to prompt, or no passage is ever found again. So it is what a prompt has in
    common with an earlier one, and :data:`~layerstream.core.passages.HEAD_TOKENS` of it at most; where a question comes
    first, the second prompt shows it. One that is shorter than what tells kinds apart is nobody's but its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: OrderedDict[str, list[tuple[int, ...]]] = OrderedDict()

    def head_of(self, token_ids: Sequence[int], most: int, tenant: str = "") -> list[int]:
        """The head of a prompt of *tenant* whose first passage begins after *most* tokens."""
        limit = tuple(token_ids[: min(most, HEAD_TOKENS)])
        with self._lock:
            known = self._tenants.pop(tenant, [])
            begun = [head for head in known if limit[: len(head)] == head]
            head = max(begun, key=len, default=limit)
            if not begun and len(limit) >= LEAST_HEAD:
                common = max((_common(other, limit) for other in known), default=0)
                head = limit[:common] if common >= LEAST_HEAD else limit
                known = [*[other for other in known if other[: len(head)] != head][-MOST_HEADS + 1 :], head]
            self._tenants[tenant] = known
            while len(self._tenants) > MOST_TENANTS:
                self._tenants.popitem(last=False)
            return list(head)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
