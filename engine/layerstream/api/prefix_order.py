"""In which order to put retrieved documents, so that most of their KV is there already. Pure.

What prompts share is what they have in common from the first token on. The same documents in another order share next
to nothing, and a retriever orders by a score that differs from question to question. Two things decide here instead:

* what is *stored*: :func:`prefix_order` puts first what continues it;
* what is *popular*: documents that many questions bring stand before those that few do, so that the beginning of a
  context is one that the next question begins with, too. An order that changed with every retrieval would share
  nothing, so popularity counts in powers of two (:func:`level`) and equals stand where they come from. Where more is
  stored in another order, that order is kept: what was learned later changes only contexts that nobody has computed.

In a conversation passages only ever come in at the end: :func:`append_new`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

MOST_QUESTIONS = 200
"""To the store, for one order: as many as a millisecond or two each allow."""


def prefix_order(
    items: Sequence[Item],
    canonical: Callable[[Item], Any],
    cached_tokens: Callable[[Sequence[Item]], int] | None = None,
) -> list[Item]:
    """*items* in the order that shares the longest stored prefix.

    Follows every beginning that is stored, item by item, as long as one more item means more stored tokens; what is
    left stands behind it canonically. Where the canonical order as a whole shares as much, it is taken. n items of
    which nothing is stored take n + 2 questions; :data:`MOST_QUESTIONS` end a longer search.

    Args:
        canonical: sort key; the order among equals of the store, and that of a context which was never seen.
        cached_tokens: how many tokens are stored at the beginning of a prompt with these items; ``None``: nothing is.
    """
    in_order = sorted(items, key=canonical)
    if cached_tokens is None or len(in_order) < 2:
        return in_order
    num_questions = 0

    def ask(some: Sequence[Item]) -> int:
        nonlocal num_questions
        num_questions += 1
        return cached_tokens(some)

    def follow(chosen: list[Item], rest: list[Item], count: int) -> tuple[int, list[Item]]:
        """The most tokens that are stored behind *chosen*, and the order that has them."""
        best = count, [*chosen, *rest]
        for position, item in enumerate(rest):
            if num_questions >= MOST_QUESTIONS:
                break
            longer, others = [*chosen, item], [*rest[:position], *rest[position + 1 :]]
            more = ask(longer)
            if more > count:
                best = max(best, follow(longer, others, more), key=lambda found: found[0])
        return best

    most, order = follow([], in_order, ask([]))
    return in_order if cached_tokens(in_order) >= most else order


class Engine(Protocol):
    """What an order asks of an engine."""

    def cached_tokens(self, prompt: Any, *, tenant: str = "") -> int:
        """Tokens at the beginning of *prompt* whose KV is there."""
        ...

    def note_retrieved(self, texts: Sequence[str], *, tenant: str = "") -> None:
        """*texts* were retrieved together."""
        ...

    def popularity(self, texts: Sequence[str], *, tenant: str = "") -> list[float]:
        """How often each was retrieved, fading."""
        ...


def learned_order(
    engine: Engine,
    items: Sequence[Item],
    canonical: Callable[[Item], Any],
    write: Callable[[Sequence[Item]], str],
    render: Callable[[str], Any],
    tenant: str = "",
) -> list[Item]:
    """*items* in the order that shares the longest stored prefix; what is retrieved often first where that leaves a
    choice. That they were retrieved is counted.

    Args:
        canonical: sort key of items that are as popular as each other.
        write: the context that items make in a prompt.
        render: the prompt of a context.
        tenant: whose questions these are.
    """
    texts = [write([item]) for item in items]
    engine.note_retrieved(texts, tenant=tenant)
    levels = {id(i): level(count) for i, count in zip(items, engine.popularity(texts, tenant=tenant), strict=True)}
    return prefix_order(
        items,
        lambda item: (-levels[id(item)], canonical(item)),
        lambda some: engine.cached_tokens(render(write(some)), tenant=tenant),
    )


def level(count: float) -> int:
    """How popular a document is that was retrieved *count* times, in steps that it seldom takes: 0 for once, 1 for
    twice, 2 for three to five times, 3 for six to eleven."""
    return max(0, round(math.log2(count))) if count > 0 else 0


def append_new(
    old: Sequence[Item], new: Iterable[Item], name: Callable[[Item], Hashable], most: int | None = None
) -> list[Item]:
    """*old* as they stand, and behind them those of *new* that are not among them: the context of a conversation's
    next turn.

    Args:
        name: what items are known by.
        most: so many stand together at most. Past it the context begins again with *new* alone, so that it is
            computed anew once and not in every turn.
    """
    found = list({name(item): item for item in new}.values())
    known = {name(item) for item in old}
    together = [*old, *(item for item in found if name(item) not in known)]
    return found if most is not None and len(together) > most else together
