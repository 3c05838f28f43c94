"""The order that shares the longest stored prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations, takewhile

from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.prefix_order import append_new, learned_order, level, prefix_order


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


class Engine:
    """Stores what was rendered; counts."""

    def __init__(self, *contexts: str) -> None:
        self.contexts = list(contexts)
        self.counts: Counter[str] = Counter()
        self.tenants: set[str] = set()

    def cached_tokens(self, prompt: str, *, tenant: str = "") -> int:
        return stored(*self.contexts)(prompt) if tenant == "t" else 0  # nothing is anybody else's

    def note_retrieved(self, texts: Sequence[str], *, tenant: str = "") -> None:
        self.counts.update(texts)
        self.tenants.add(tenant)

    def popularity(self, texts: Sequence[str], *, tenant: str = "") -> list[float]:
        return [self.counts[text] * 0.99 for text in texts]

    def ask(self, found: str) -> str:
        context = "".join(learned_order(self, found, str, "".join, str, "t"))
        self.contexts.append(context)
        return context


def test_what_is_retrieved_often_comes_first() -> None:
    engine = Engine()
    engine.counts.update("zzzzzzy")
    assert engine.ask("ayz") == "zya"
    assert engine.tenants == {"t"}
    assert engine.counts["z"] == 7


def test_what_is_stored_is_followed_though_other_things_became_popular() -> None:
    engine = Engine("abc")
    engine.counts.update("cccccccc")
    assert engine.ask("cab") == "abc"
    assert engine.ask("cxb") == "cbx", "nothing that helps is stored"


@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=4), min_size=1, max_size=30))
def test_learning_changes_the_order_and_nothing_else(asked: list[set[str]]) -> None:
    engine = Engine()
    for found in asked:
        before = list(engine.contexts)
        context = engine.ask("".join(sorted(found, reverse=True)))
        assert sorted(context) == sorted(found)
        for other in permutations(sorted(found)):
            assert stored(*before)(context) >= stored(*before)("".join(other)), "no other order shares more"


def test_levels_hardly_ever_change() -> None:
    assert [level(count) for count in (0, 0.3, 1, 2, 3, 5, 6, 11, 12)] == [0, 0, 0, 1, 2, 2, 3, 3, 4]
    changes = [count for count in range(2, 100) if level(count * 0.99) != level((count - 1) * 0.99)]
    assert len(changes) == 7


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=12))
def test_a_conversations_context_only_grows(turns: list[list[int]]) -> None:
    context: list[int] = []
    for found in turns:
        longer = append_new(context, found, int)
        assert longer[: len(context)] == context
        assert len(set(longer)) == len(longer)
        assert set(longer) == {*context, *found}
        context = longer


def test_a_context_that_is_full_begins_again() -> None:
    assert append_new([1, 2, 3], [3, 4], int, 4) == [1, 2, 3, 4]
    assert append_new([1, 2, 3, 4], [4, 5], int, 4) == [4, 5]
    assert append_new([1, 2], [2, 1], int, 1) == [2, 1], "what was found is never cut"
