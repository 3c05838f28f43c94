"""Passages of a conversation: they come in at its end, and none comes twice.

A later turn's prompt then begins as the one before, as far as what stands in front: its KV is found. :func:`leave_out`
takes what was shown before out of what a tool found, and is pure. :class:`Growing` keeps what a conversation has
been shown, for frameworks that keep no state of it themselves.

Invariants of :class:`Growing`: any thread may call, and one of two that bring the same item adds it. It holds
:data:`MOST_ITEMS` items at most, or those of one call where these are more. Copies go on alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from layerstream.api.prefix_order import append_new

Item = TypeVar("Item")

MOST_ITEMS = 1000
"""That a conversation is remembered by: more than any context holds."""
NOTHING_NEW = "Nothing that is not above already."
"""What stands in the place of passages that have all been in the conversation."""


def leave_out(
    texts: Sequence[str], passages: Sequence[str], known: Collection[str], separator: str = "\n\n"
) -> tuple[list[str], list[int]]:
    """*texts*, the parts of what a tool said, without those of *passages* that are *known* or come twice; and the
    numbers of the passages that were left out.

    To a passage belongs what stands around it up to the *separator*, such as a line that says its source. A text that
    has nothing else is empty. A passage that does not stand in *texts* as it is cannot be left out.

    Args:
        passages: in the order in which they stand in *texts*.
        known: what the conversation has been shown.
    """
    seen, repeated = set(known), set[int]()
    for number, passage in enumerate(passages):
        if passage in seen:
            repeated.add(number)
        seen.add(passage)
    if not repeated:
        return list(texts), []
    rest, left_out, next_passage = list[str](), list[int](), 0
    for text in texts:
        places = _places(text, passages, next_passage)
        if places:
            next_passage = places[-1][0] + 1
        rest.append(_without(text, places, repeated, separator))
        left_out += [number for number, _, _ in places if number in repeated]
    return rest, left_out


def _places(text: str, passages: Sequence[str], first: int) -> list[tuple[int, int, int]]:
    """Number, start and stop of those of *passages* from the *first* on that stand in *text*, in order."""
    places, position = list[tuple[int, int, int]](), 0
    for number, passage in enumerate(passages[first:], start=first):
        at = text.find(passage, position) if passage.strip() else -1
        if at >= 0:
            position = at + len(passage)
            places.append((number, at, position))
    return places


def _without(text: str, places: Sequence[tuple[int, int, int]], repeated: Collection[int], separator: str) -> str:
    """*text* without those of its *places* that are *repeated*."""
    if not any(number in repeated for number, _, _ in places):
        return text
    begin = text.rfind(separator, 0, places[0][1])
    begin = 0 if begin < 0 else begin + len(separator)
    end = text.find(separator, places[-1][2])
    end = len(text) if end < 0 else end
    kept, start, between = list[str](), begin, ""
    for (number, _, stop), following in zip(places, [*places[1:], None], strict=True):
        cut = end if following is None else text.find(separator, stop, following[1])
        if number not in repeated:
            kept += [between if kept else "", text[start : stop if cut < 0 else cut]]
        between = "" if cut < 0 else separator
        start = stop if cut < 0 else cut + len(separator)
    head, tail = text[:begin], text[end:]
    return head + ("".join(kept) or (NOTHING_NEW if head or tail else "")) + tail


class Growing(Generic[Item]):
    """What a conversation has been shown so far, and behind it what is new.

    Args:
        name: what items are known by.
    """

    def __init__(self, name: Callable[[Item], Hashable]) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._names: dict[Hashable, None] = {}

    def grow(self, new: Iterable[Item], most: int | None = None) -> list[Item]:
        """All items, those of *new* that are new among them at the end.

        Args:
            most: so many at most, ``None``: :data:`MOST_ITEMS`; past it the conversation begins again with *new*.
        """
        found, most = list(new), MOST_ITEMS if most is None else min(most, MOST_ITEMS)
        with self._lock:
            self._items = append_new(self._items, found, self._name, most)
            return list(self._items)

    def only_new(self, new: Iterable[Item]) -> list[Item]:
        """Those of *new* that were not returned before; past :data:`MOST_ITEMS` the ones that were returned first are
        forgotten, and would be returned again."""
        found = {self._name(item): item for item in new}
        with self._lock:
            fresh = [item for name, item in found.items() if name not in self._names]
            for name in found:
                self._names.pop(name, None)
                self._names[name] = None
            while len(self._names) > max(MOST_ITEMS, len(found)):
                del self._names[next(iter(self._names))]
            return fresh

    def reset(self) -> None:
        """The conversation begins anew."""
        with self._lock:
            self._items, self._names = [], {}

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"_name": self._name, "_items": list(self._items), "_names": dict(self._names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
