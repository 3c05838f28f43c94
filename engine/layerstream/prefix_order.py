"""In which order to put retrieved documents, so that most of their KV is there already. Pure.

What prompts share is what they have in common from the first token on. The same documents in another order share next
to nothing, and a retriever orders by a score that differs from question to question. :func:`prefix_order` asks what is
stored and puts first what continues it; everything else stands in an order that does not depend on the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def prefix_order(
    items: Sequence[Item],
    canonical: Callable[[Item], Any],
    cached_tokens: Callable[[Sequence[Item]], int] | None = None,
) -> list[Item]:
    """*items* in the order that shares the longest stored prefix.

    Greedy: at each place stands the item with which the most tokens are stored, as long as that is more than without
    it; the rest follows canonically. Where the canonical order as a whole shares as much, it is taken. Takes at most
    ``n (n + 1) / 2 + 2`` questions for n items, and n + 2 where nothing is stored.

    Args:
        canonical: sort key; the order among equals of the store, and that of a context which was never seen.
        cached_tokens: how many tokens are stored at the beginning of a prompt with these items; ``None``: nothing is.
    """
    rest = sorted(items, key=canonical)
    if cached_tokens is None or len(rest) < 2:
        return rest
    canonically, chosen, best = list(rest), [], cached_tokens([])
    while rest:
        counts = [cached_tokens([*chosen, item]) for item in rest]
        most = max(counts)
        if most <= best:
            break
        best = most
        chosen.append(rest.pop(counts.index(most)))
    return canonically if best <= cached_tokens(canonically) else [*chosen, *rest]
