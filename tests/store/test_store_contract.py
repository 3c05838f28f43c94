"""What the scheduler relies on in a store: the real one and the one that its tests run with keep to the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from layerstream.kv.keys import snapshot_key
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.stored import SpillStore
from layerstream.store.store import PrefixStore

from tests.scheduling.test_spill import FakeStore
from tests.scheduling.test_states import Slots
from tests.scheduling.test_states import Store as StateStore
from tests.store.memory_tier import MemoryTier, batch, open_store
from tests.store.pages import chain
from tests.store.snapshots import STATES

KEYS = chain(*range(4))


class Subject:
    """A store, and how its writer is made to work or kept from it."""

    def __init__(self, store: PrefixStore | FakeStore, work: Callable[[bool], None], pause: Callable[[], None]) -> None:
        self.store = store
        self.work = work
        self.pause = pause


def real() -> Iterator[Subject]:
    tier = MemoryTier()
    store = open_store(tier)

    def work(is_full: bool) -> None:
        tier.is_full = is_full
        tier.gate.set()
        store.flush()

    def pause() -> None:
        store.flush()
        tier.gate.clear()
        store.publish(batch(chain("stuck"), 90), 0.0)  # the writer is at it
        while len(store._writer._queue.batches):
            pass

    yield Subject(store, work, pause)
    tier.gate.set()
    store.close()


def fake() -> Iterator[Subject]:
    store = FakeStore(random.Random(0))
    store.rng.random = lambda: 0.5  # type: ignore[method-assign]  # never slow

    def work(is_full: bool) -> None:
        while store.queue:
            store.work(dict.fromkeys(range(100), ()), is_full=is_full)

    yield Subject(store, work, lambda: None)


@pytest.fixture(params=[real, fake])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield from request.param()


def test_what_is_published_is_taken_once_it_is_written(subject: Subject) -> None:
    store: SpillStore = subject.store
    assert store.can_spill
    found = store.take(KEYS, 0)
    assert found is not None
    assert (found.num_pages, store.count_stored(KEYS)) == (0, 0)
    subject.store.publish(batch(KEYS), 0.1)
    subject.work(False)
    assert store.count_stored(KEYS) == 4
    assert store.count_stored([*KEYS[:2], *chain("other"), *KEYS[2:]]) == 2
    found = store.take(KEYS, 1)
    assert found is not None
    assert found.num_pages == 3
    assert sorted(store.collect()) == [0, 1, 2, 3]
    assert store.collect() == [], "once"


def test_what_is_given_back_is_not_given_up(subject: Subject) -> None:
    """A later prompt computes the same pages, and waits for them to be stored."""
    subject.pause()
    subject.store.publish(batch(KEYS[:2]), 0.1)
    assert sorted(subject.store.give_back()) == [0, 1]
    assert not subject.store.has_given_up(KEYS[0])
    subject.store.publish(batch(KEYS, 10, is_spilled=True), 0.1)
    assert subject.store.give_back() == [], "somebody waits for it"
    assert not any(map(subject.store.has_given_up, KEYS))
    subject.work(False)
    assert subject.store.count_stored(KEYS) == 4


def test_what_found_no_room_is_given_up_until_it_is_published_again(subject: Subject) -> None:
    subject.store.publish(batch(KEYS, is_spilled=True), 0.1)
    subject.work(True)
    assert all(map(subject.store.has_given_up, KEYS))
    assert sorted(subject.store.collect()) == [0, 1, 2, 3]
    subject.pause()
    subject.store.publish(batch(KEYS, 20, is_spilled=True), 0.1)
    assert not any(map(subject.store.has_given_up, KEYS))
    subject.work(False)
    assert subject.store.count_stored(KEYS) == 4


def test_only_who_waits_is_told(subject: Subject) -> None:
    subject.store.publish(batch(KEYS), 0.1)
    subject.work(True)
    assert not any(map(subject.store.has_given_up, KEYS)), "nobody waits for it"


def test_holding_what_is_not_there_is_harmless(subject: Subject) -> None:
    subject.store.hold(1, KEYS)
    subject.store.hold(1, [])
    subject.store.unhold(1)
    subject.store.unhold(2)
    subject.store.abandon(KEYS)
    subject.store.abandon([])


@pytest.mark.parametrize("after", [(), (1,), (2, 5), (5, 6), tuple(range(1, 7))])
def test_the_store_of_the_schedulers_tests_answers_as_the_real_one_where_there_are_recurrent_layers(
    after: tuple[int, ...],
) -> None:
    keys = chain(*range(8))
    snapshots = [snapshot_key(keys[count - 1]) for count in after]
    fake = StateStore(Slots(0), random.Random(0))
    fake._rng.random = lambda: 0.5  # type: ignore[method-assign]  # never slow
    fake.pages, fake.snapshots = dict.fromkeys(keys[:6], ()), dict.fromkeys(snapshots, ())
    tier = MemoryTier()
    tier.keys = {*keys[:6], *snapshots}
    store = open_store(tier, [RecurrentLayer(STATES[0], 1)])
    for start in range(9):
        for resumable in range(start + 1):
            while (found := store.take(keys, start, resumable)) is None:
                pass
            expected = fake.take(keys, start, resumable)
            assert expected is not None
            assert (found.num_pages, found.snapshot) == (expected.num_pages, expected.snapshot)
    store.close()
