"""How experts are divided between the link and the processor."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.streaming.experts.paths import ASSUMED_LINK_RATE, RETRY, ExpertPaths, divide


def later_of_both(chosen: tuple[int, ...], num: int, ship_seconds: float, host_seconds: list[float]) -> float:
    return max(sum(host_seconds[place] for place in chosen), (num - len(chosen)) * ship_seconds)


@given(rows=st.lists(st.integers(1, 50), max_size=9), ship=st.floats(0.01, 10), per_row=st.floats(0.01, 10))
def test_no_other_division_is_done_sooner(rows: list[int], ship: float, per_row: float) -> None:
    host = [0.5 + per_row * count for count in rows]
    chosen = divide(rows, ship, host)
    assert chosen == sorted(set(chosen))
    places = range(len(rows))
    every = chain.from_iterable(combinations(places, size) for size in range(len(rows) + 1))
    best = min(later_of_both(some, len(rows), ship, host) for some in every)
    assert later_of_both(tuple(chosen), len(rows), ship, host) <= best * (1 + 1e-9)


def test_few_rows_stay_and_many_cross() -> None:
    paths = ExpertPaths(3_000_000)
    for _ in range(30):
        paths.shipped(150e-6)
        paths.computed(1, 60e-6)
        paths.computed(64, 3e-3)
    assert len(paths.choose([1] * 8, 100)) >= 5
    assert paths.choose([64] * 8, 1000) == []
    assert paths.choose([64, 1, 64, 1], 1000) == [1, 3]


def test_before_anything_is_measured_the_processor_gets_some() -> None:
    """So that it is measured."""
    paths = ExpertPaths(3_000_000)
    assert paths.ship_seconds == pytest.approx(3_000_000 / ASSUMED_LINK_RATE)
    assert 0 < len(paths.choose([1] * 8, 100)) < 8


def test_one_slow_time_does_not_settle_it() -> None:
    paths = ExpertPaths(3_000_000)
    paths.computed(1, 9.0)  # the first time threads are started, pages touched
    assert paths.choose([1] * 8, 100)
    paths.computed(1, 5.0)
    assert paths.choose([1] * 8, 100) == []
    chosen = [paths.choose([3, 1, 3], 100) for _ in range(RETRY - 1)]
    assert chosen[-1] == [1]
    assert not any(chosen[:-1])
    paths.computed(1, 50e-6)
    assert len(paths.choose([1] * 8, 100)) > 4


def test_no_more_rows_than_there_is_memory_for() -> None:
    paths = ExpertPaths(3_000_000)
    for _ in range(9):
        paths.shipped(1.0)
        paths.computed(1, 1e-6)
    assert paths.choose([5, 1, 9, 2], 8) == [0, 1, 3]
