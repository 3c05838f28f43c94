"""Which documents are warmed."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from layerstream.warming.choice import MOST_MISSES, Allowance, Sizes, ranked, share_of

NUMBERS = st.lists(st.floats(0, 1e6), max_size=30)


@given(NUMBERS, st.integers(1, 40))
def test_the_most_popular_come_first_and_equals_as_they_came(popularity: list[float], top: int) -> None:
    texts = [f"text {at}" for at in range(len(popularity))]
    order = ranked(texts, popularity)
    assert sorted(order) == sorted(texts)
    known = dict(zip(texts, popularity, strict=True))
    for first, second in itertools.pairwise(order):
        assert (-known[first], texts.index(first)) < (-known[second], texts.index(second))
    assert ranked(texts, popularity, top) == order[:top]


def test_a_text_counts_once() -> None:
    assert ranked(["a", "b", "a"], [1.0, 2.0, 1.0]) == ["b", "a"]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(0, 500))
def test_never_more_than_there_is_room_for(sizes: list[int], room: int) -> None:
    allowance = Allowance(room)
    admitted = [size for size in sizes if not allowance.spent and allowance.admit(size)]
    assert sum(admitted) == allowance.taken <= room
    if sum(sizes) <= room:
        assert admitted == sizes


def test_a_smaller_one_behind_may_still_fit_but_the_search_ends() -> None:
    allowance = Allowance(10)
    assert [allowance.admit(size) for size in (8, 5, 2)] == [True, False, True]
    for _ in range(MOST_MISSES):
        assert not allowance.spent
        allowance.admit(1)
    assert allowance.spent


def test_the_share_of_what_was_retrieved() -> None:
    assert share_of([3.0], [3.0, 1.0]) == 0.75
    assert share_of([0.0], [0.0, 0.0]) is None


def test_snapshots_at_the_end_and_every_so_many_pages() -> None:
    sizes = Sizes(page_bytes=10, snapshot_bytes=100, stride=4)
    assert [sizes.of(pages) for pages in (0, 1, 4, 9)] == [0, 110, 240, 390]
    assert Sizes(page_bytes=10).of(3) == 30
