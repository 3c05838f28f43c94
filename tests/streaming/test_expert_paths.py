"""How experts are divided between the link and the processor."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.streaming.expert_paths import ASSUMED_LINK_RATE, ExpertPaths, divide


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
    assert len(paths.choose([1] * 8)) >= 5
    assert paths.choose([64] * 8) == []
    assert paths.choose([64, 1, 64, 1]) == [1, 3]


def test_before_anything_is_measured_the_processor_gets_some() -> None:
    """So that it is measured."""
    paths = ExpertPaths(3_000_000)
    assert paths.ship_seconds == pytest.approx(3_000_000 / ASSUMED_LINK_RATE)
    assert 0 < len(paths.choose([1] * 8)) < 8
