"""The order that shares the longest stored prefix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.prefix_order import prefix_order


def stored(*contexts: str):
    """Counts letters that a context shares with the best of *contexts*."""

    def count(items: Sequence[str]) -> int:
        text = "".join(items)
        return max(
            (
                sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, old, strict=False)))
                for old in contexts
            ),
            default=0,
        )

    return count


def order(items: str, *contexts: str) -> str:
    return "".join(prefix_order(items, str, stored(*contexts)))


def test_what_nobody_has_seen_stands_canonically() -> None:
    assert order("cab") == "abc"
    assert prefix_order("cab", str) == ["a", "b", "c"]


def test_what_was_stored_comes_again_in_its_order() -> None:
    assert order("abc", "cab") == "cab"
    assert order("abcd", "cab") == "cabd"
    assert order("abd", "bxy", "dab") == "dab"
    assert order("ab", "ab") == "ab"


def test_the_longest_of_several_is_continued() -> None:
    assert order("abc", "ca", "bca") == "bca"


def test_asks_no_more_than_it_must() -> None:
    asked = []
    prefix_order(range(20), int, lambda items: asked.append(items) or 0)
    assert len(asked) == 22
    asked.clear()
    prefix_order(range(20), int, lambda items: asked.append(items) or len(items))
    assert len(asked) <= 202


@given(st.permutations("abcdef"), st.lists(st.permutations("abcdef").map("".join), max_size=4))
def test_never_shares_less_than_the_canonical_order_and_loses_nothing(items: list[str], contexts: list[str]) -> None:
    count = stored(*contexts)
    result = prefix_order(items, str, count)
    assert sorted(result) == sorted(items)
    assert count(result) >= count(sorted(items))
    assert result == prefix_order(sorted(items, reverse=True), str, count), "whatever order the retriever chose"
