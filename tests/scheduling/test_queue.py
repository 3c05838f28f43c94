"""Who is next: priorities, ageing, fairness, what is cached; and against the rule written down as one sort."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.scheduling import queue as module
from layerstream.scheduling.queue import AGEING_SWEEPS, WaitingQueue


def make(number: int, priority: int = 0, client: str = "") -> Sequence:
    return Sequence(number, [1] * 10, 10, SamplingParams(max_tokens=5), priority=priority, client=client)


def arrive(queue: WaitingQueue, sequence: Sequence) -> None:
    queue.enter(sequence)
    queue.add(sequence)


def order(queue: WaitingQueue, cached: dict[int, int] | None = None) -> list[int]:
    return [s.sequence_id for s in queue.in_order(lambda s: (cached or {}).get(s.sequence_id, 0))]


def test_arrival_then_what_is_cached_then_priority() -> None:
    queue = WaitingQueue()
    for number in range(3):
        arrive(queue, make(number))
    assert order(queue) == [0, 1, 2]
    assert order(queue, {2: 8, 1: 4}) == [2, 1, 0]
    arrive(queue, make(3, priority=1))
    assert order(queue, {2: 8, 1: 4}) == [3, 2, 1, 0]


def test_who_waits_long_enough_overtakes() -> None:
    queue = WaitingQueue()
    arrive(queue, make(0))
    for number in range(1, 2 * AGEING_SWEEPS + 2):
        arrive(queue, make(number, priority=2))
        queue.tick()
    late = [make(number, priority=2) for number in (100, 101)]
    for sequence in late:
        arrive(queue, sequence)
    assert order(queue).index(0) < order(queue).index(100)


def test_who_is_suspended_keeps_what_it_has_waited() -> None:
    queue = WaitingQueue()
    arrive(queue, old := make(0))
    for _ in range(AGEING_SWEEPS):
        queue.tick()
    queue.remove(old)
    for _ in range(5):  # it runs; that is no waiting
        queue.tick()
    queue.add(old)
    arrive(queue, make(1, priority=1))
    assert order(queue) == [0, 1]
    arrive(queue, make(2, priority=2))
    assert order(queue) == [2, 0, 1]


def test_a_client_with_many_requests_does_not_crowd_out_another() -> None:
    queue = WaitingQueue()
    busy = [make(number, client="busy") for number in range(5)]
    for sequence in busy:
        arrive(queue, sequence)
    queue.serve(busy[0], 100)
    arrive(queue, make(9, client="rare"))
    queue.serve(busy[0], 1)
    assert order(queue)[0] == 9


def test_absence_earns_no_credit() -> None:
    queue = WaitingQueue()
    here = make(0, client="here")
    arrive(queue, here)
    queue.serve(here, 1000)
    arrive(queue, back := make(1, client="back"))
    queue.serve(back, 10)
    assert order(queue) == [0, 1], "it began where the other one was"


def test_leaving_and_coming_back_gains_nothing_over_who_waited() -> None:
    queue = WaitingQueue()
    arrive(queue, make(0, client="patient"))
    arrive(queue, first := make(1, client="clever"))
    queue.serve(first, 1000)
    for gone_for in (0, 1, AGEING_SWEEPS, AGEING_SWEEPS + 1, 3 * AGEING_SWEEPS):
        queue.remove(first) if first in queue else None
        queue.leave(first)
        for _ in range(gone_for):
            queue.tick()
        arrive(queue, first := make(2 + gone_for, client="clever"))
        assert order(queue)[0] == 0, f"gone for {gone_for} sweeps"


def test_clients_that_are_gone_are_forgotten() -> None:
    queue = WaitingQueue()
    arrive(queue, stays := make(0, client="stays"))
    for number in range(1, 200):
        arrive(queue, sequence := make(number, client=f"client {number}"))
        queue.remove(sequence)
        queue.serve(sequence, 100)
        queue.leave(sequence)
        queue.tick()
        assert queue.num_clients <= AGEING_SWEEPS + 2
    queue.remove(stays)
    queue.leave(stays)
    assert queue.num_clients == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), min_size=1, max_size=30))
def test_nobody_starves(arrivals: list[tuple[int, str]]) -> None:
    """One leaves per sweep, and one of priority 3 arrives: everybody who was there leaves in bounded time."""
    queue = WaitingQueue()
    first = [make(number, *arrival) for number, arrival in enumerate(arrivals)]
    for sequence in first:
        arrive(queue, sequence)
    number = len(first)
    for _ in range(len(first) + 5 * AGEING_SWEEPS):
        following = next(queue.in_order(lambda sequence: 0))
        queue.remove(following)
        queue.serve(following, 10)
        queue.leave(following)
        arrive(queue, make(number, 3, "new"))
        number += 1
        queue.tick()
    assert not [sequence for sequence in first if sequence in queue]


class Reference:
    """The rule as one sort over all that wait, the clients looked for among all that are present."""

    def __init__(self) -> None:
        self.waited: dict[Sequence, int] = {}
        self.running: list[Sequence] = []
        self.before: dict[Sequence, int] = {}  # what those that run have waited
        self.served: dict[str, int] = {}
        self.gone: dict[str, int] = {}
        self.sweep = 0

    def present(self) -> set[str]:
        return {sequence.client for sequence in (*self.waited, *self.running)}

    def enter(self, sequence: Sequence) -> None:
        if sequence.client not in self.present():
            least = min((self.served[client] for client in self.present()), default=0)
            self.served[sequence.client] = max(self.served.get(sequence.client, 0), least)
            self.gone.pop(sequence.client, None)
        self.waited[sequence] = 0

    def leave(self, sequence: Sequence) -> None:
        self.waited.pop(sequence, None)
        self.running = [other for other in self.running if other is not sequence]
        if sequence.client not in self.present():
            self.gone[sequence.client] = self.sweep
        if not self.present():
            self.served, self.gone = {}, {}

    def tick(self) -> None:
        self.sweep += 1
        for sequence in self.waited:
            self.waited[sequence] += 1
        for client in [client for client, sweep in self.gone.items() if sweep < self.sweep - AGEING_SWEEPS]:
            del self.gone[client], self.served[client]

    def in_order(self, cached: dict[int, int], look_ahead: int) -> list[Sequence]:
        def place(sequence: Sequence) -> tuple[int, int]:
            return -(sequence.priority + self.waited[sequence] // AGEING_SWEEPS), self.served[sequence.client]

        found: list[Sequence] = []
        for equal in sorted({place(sequence) for sequence in self.waited}):
            group = sorted((s for s in self.waited if place(s) == equal), key=lambda s: s.sequence_id)
            for at in range(0, len(group), look_ahead):
                ahead = group[at : at + look_ahead]
                found += sorted(
                    ahead, key=lambda s: (-cached.get(s.sequence_id, 0) / s.num_prompt_tokens, s.sequence_id)
                )
        return found


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 3), st.sampled_from("abcd")),
        st.tuples(st.just("admit"), st.integers(1, 4), st.none()),
        st.tuples(st.just("suspend"), st.integers(0, 9), st.none()),
        st.tuples(st.just("leave"), st.integers(0, 9), st.none()),
        st.tuples(st.just("serve"), st.integers(1, 3), st.integers(0, 9)),
        st.tuples(st.just("tick"), st.integers(1, 12), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(STEPS, st.dictionaries(st.integers(0, 60), st.integers(0, 10)), st.sampled_from([2, 1000]))
def test_is_the_order_of_one_sort(steps: list[tuple], cached: dict[int, int], look_ahead: int) -> None:
    queue, reference = WaitingQueue(), Reference()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOOK_AHEAD", look_ahead)
        for number, (kind, first, second) in enumerate(steps):
            here = [*reference.waited, *reference.running]
            if kind == "arrive":
                arrive(queue, sequence := make(number, first, second))
                reference.enter(sequence)
            elif kind == "admit":
                _admit(queue, reference, first, cached)
            elif kind == "suspend" and reference.running:
                queue.add(sequence := reference.running.pop(first % len(reference.running)))
                reference.waited[sequence] = reference.before[sequence]
            elif kind == "leave" and here:
                sequence = here[first % len(here)]
                if sequence in queue:
                    queue.remove(sequence)
                queue.leave(sequence)
                reference.leave(sequence)
            elif kind == "serve" and reference.running:
                sequence = reference.running[second % len(reference.running)]
                queue.serve(sequence, first)
                reference.served[sequence.client] += first
            elif kind == "tick":
                for _ in range(first):
                    queue.tick()
                    reference.tick()
            assert _numbers(queue.in_order(lambda s: cached.get(s.sequence_id, 0))) == _numbers(
                reference.in_order(cached, look_ahead)
            )
            assert queue.num_clients == len(reference.served)


def _admit(queue: WaitingQueue, reference: Reference, count: int, cached: dict[int, int]) -> None:
    """The first *count* run, taken out while the order is being asked for, as the scheduler does."""
    in_order = queue.in_order(lambda sequence: cached.get(sequence.sequence_id, 0))
    for _, sequence in zip(range(count), in_order, strict=False):
        queue.remove(sequence)
        reference.before[sequence] = reference.waited.pop(sequence)
        reference.running.append(sequence)
    in_order.close()


def _numbers(sequences: Iterable[Sequence]) -> list[int]:
    return [sequence.sequence_id for sequence in sequences]


def test_what_is_looked_at_does_not_grow_with_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks at what is cached, and in entries of heaps that are moved."""
    for length in (1_000, 20_000):
        queue, moved, looked = WaitingQueue(), [0], [0]

        def counted(heap: list, entry: object, put=module.heapq.heappush, moved: list[int] = moved) -> None:
            moved[0] += 1
            put(heap, entry)

        def look(sequence: Sequence, looked: list[int] = looked) -> int:
            looked[0] += 1
            return 0

        for number in range(length):
            arrive(queue, make(number, number % 3, client=f"client {number % 500}"))
        monkeypatch.setattr(module.heapq, "heappush", counted)
        for number in range(50):
            queue.tick()
            in_order = queue.in_order(look)
            queue.remove(sequence := next(in_order))
            in_order.close()
            queue.serve(sequence, 10)
            arrive(queue, make(length + number, client="late"))
        monkeypatch.undo()
        assert looked[0] <= 50 * module.LOOK_AHEAD, f"{length} wait"
        assert moved[0] <= 50 * 4 * module.LOOK_AHEAD, f"{length} wait"
