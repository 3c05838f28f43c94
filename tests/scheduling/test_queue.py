"""Who is next: priorities, ageing, fairness, what is cached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from layerstream.params import SamplingParams
from layerstream.scheduling.queue import AGEING_SWEEPS, WaitingQueue
from layerstream.sequence import Sequence


def make(number: int, priority: int = 0, client: str = "") -> Sequence:
    return Sequence(number, [1] * 10, 10, SamplingParams(max_tokens=5), priority=priority, client=client)


def order(queue: WaitingQueue, cached: dict[int, int] | None = None) -> list[int]:
    return [s.sequence_id for s in queue.in_order(lambda s: (cached or {}).get(s.sequence_id, 0))]


def test_arrival_then_what_is_cached_then_priority() -> None:
    queue = WaitingQueue()
    for number in range(3):
        queue.add(make(number), [])
    assert order(queue) == [0, 1, 2]
    assert order(queue, {2: 8, 1: 4}) == [2, 1, 0]
    queue.add(make(3, priority=1), [])
    assert order(queue, {2: 8, 1: 4}) == [3, 2, 1, 0]


def test_who_waits_long_enough_overtakes() -> None:
    queue = WaitingQueue()
    queue.add(make(0), [])
    for number in range(1, 2 * AGEING_SWEEPS + 2):
        queue.add(make(number, priority=2), [])
        queue.tick()
    late = [make(number, priority=2) for number in (100, 101)]
    for sequence in late:
        queue.add(sequence, [])
    assert order(queue).index(0) < order(queue).index(100)


def test_a_client_with_many_requests_does_not_crowd_out_another() -> None:
    queue = WaitingQueue()
    busy = [make(number, client="busy") for number in range(5)]
    for sequence in busy:
        queue.add(sequence, [])
    queue.serve(busy[0], 100)
    queue.add(make(9, client="rare"), [])
    queue.serve(busy[0], 1)
    assert order(queue)[0] == 9


def test_absence_earns_no_credit() -> None:
    queue = WaitingQueue()
    here = make(0, client="here")
    queue.add(here, [])
    queue.serve(here, 1000)
    queue.add(back := make(1, client="back"), [])
    queue.serve(back, 10)
    assert order(queue) == [0, 1], "it began where the other one was"


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), min_size=1, max_size=30))
def test_nobody_starves(arrivals: list[tuple[int, str]]) -> None:
    """One leaves per sweep, and one of priority 3 arrives: everybody who was there leaves in bounded time."""
    queue = WaitingQueue()
    first = [make(number, *arrival) for number, arrival in enumerate(arrivals)]
    for sequence in first:
        queue.add(sequence, [])
    number = len(first)
    for _ in range(len(first) + 5 * AGEING_SWEEPS):
        following = queue.in_order(lambda sequence: 0)[0]
        queue.remove(following)
        queue.serve(following, 10)
        queue.add(make(number, 3, "new"), [])
        number += 1
        queue.tick()
    assert not [sequence for sequence in first if sequence in queue]
