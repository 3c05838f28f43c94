"""In which order to put retrieved documents, so that most of their KV is there already. Pure.

What prompts share is what they have in common from the first token on. The same documents in another order share next
to nothing, and a retriever orders by a score that differs from question to question. :func:`prefix_order` asks what is
stored and puts first what continues it; everything else stands in an order that does not depend on the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
