"""A store that fails is a store that is off: no error of it, and no wait for it, reaches the engine's thread."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.stored import PublishedState, Stored
from layerstream.store import connection
from layerstream.store.choice import Rates
from layerstream.store.codecs import CODECS
from layerstream.store.connection import Question
from layerstream.store.database import IndexReplaced
from layerstream.store.outage import CALM_SECONDS, FIRST_SECONDS, LONGEST_SECONDS, Outage
from layerstream.store.retrievals import retrieval
from layerstream.store.store import PrefixStore

from tests.store.memory_tier import MemoryTier, a_layer, batch, open_store
from tests.store.pages import chain
from tests.store.snapshots import STATES

KEYS = chain(*range(4))
METHODS = [
    "contains", "any_of", "open", "put", "room", "pin", "drop", "claim", "announce", "is_announced", "unclaim",
    "remember", "recall", "note_retrieved", "retrieved", "tick", "close",
]  # fmt: skip
ERRORS = [
    OSError(28, "No space left on device"),
    PermissionError(13, "Permission denied"),
    sqlite3.OperationalError("database is locked"),
    sqlite3.DatabaseError("file is not a database"),
    sqlite3.IntegrityError("FOREIGN KEY constraint failed"),
    IndexReplaced("it was replaced"),
]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerstream.store.outage.FIRST_SECONDS", 0.005)
    monkeypatch.setattr("layerstream.store.outage.LONGEST_SECONDS", 0.02)


def use(store: PrefixStore, choice: int) -> None:
    """One of the things that the engine's thread does."""
    actions = (
        lambda: store.take(KEYS, 0),
        lambda: store.take(chain("x", choice), 1),
        lambda: store.take(chain("y", choice), 2, 1),
        lambda: store.abandon(KEYS),
        lambda: store.lose(KEYS[0]),
        lambda: store.pin(KEYS),
        lambda: store.hold(choice, KEYS),
        lambda: store.unhold(choice),
        lambda: store.count_stored(KEYS),
        lambda: store.has_given_up(KEYS[0]),
        lambda: store.recall(KEYS, 20),
        lambda: store.remember(KEYS, list(range(20)), [1, 2]),
        lambda: store.look_up(KEYS),
        lambda: store.room(),
        lambda: store.note_retrieved(retrieval("", "", ["a"])),
        lambda: store.retrieved(retrieval("", "", ["a"])),
    )
    actions[choice % len(actions)]()


def eventually(holds: object, seconds: float = 20.0) -> None:
    """Wait until *holds* does."""
    done = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if holds():  # type: ignore[operator]
            return
        done.wait(0.005)
    raise AssertionError("it never came to that")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 17), st.sampled_from(METHODS), st.sampled_from(ERRORS)), max_size=12))
def test_whatever_fails_whenever_nothing_is_raised_and_every_frame_and_slot_comes_back(
    steps: list[tuple[int, str, Exception]],
) -> None:
    tier = MemoryTier()
    store = open_store(tier, [RecurrentLayer(STATES[0], 1)])
    published, returned, slots = 0, [], []
    for choice, method, error in steps:
        tier.errors = {method: error} if choice % 3 else {}
        use(store, choice)
        store.publish(batch(chain(published), published, is_spilled=bool(choice % 2)), 0.1)
        store.publish_state(PublishedState(chain(published)[0], published, 4), 0.1)
        published += 1
        if choice % 5 == 0:
            returned += store.give_back()
        if choice % 7 == 0:
            slots += store.give_back_slots()
        returned += store.collect()
        slots += store.collect_slots()
    assert store._writer._thread.is_alive()
    tier.errors = {}
    eventually(lambda: store.state == "ready")
    store.flush()
    store.publish(batch(KEYS, published), 0.1)
    eventually(lambda: store.count_stored(KEYS) == 4)
    tier.errors = {"close": OSError("even so")}
    store.close()
    store.close()
    assert sorted(returned + store.collect()) == list(range(published + 4)), "each exactly once"
    assert sorted(slots + store.collect_slots()) == list(range(published)), "each exactly once"
    assert not store._writer._thread.is_alive()
    assert not store._connection._thread.is_alive()


def test_one_warning_says_why_and_what_is_queued_is_written_later(caplog: pytest.LogCaptureFixture) -> None:
    tier = MemoryTier()
    store = open_store(tier)
    tier.errors = dict.fromkeys(METHODS, OSError(28, "No space left on device"))
    with caplog.at_level(logging.WARNING, logger="layerstream"):
        for number in range(20):
            assert store.take(chain(number), 0) == Stored(0, 0)
        store.publish(batch(KEYS), 0.1)
        eventually(lambda: len(store._writer._queue.batches) == 1 and store.state == "off" and caplog.records)
    assert [record.getMessage() for record in caplog.records] == [
        "no KV store: No space left on device; answers go on without it, and it is tried again now and then"
    ]
    assert store.reason == "No space left on device"
    tier.errors = {}
    eventually(lambda: store.counters.written_pages == 4)
    assert sorted(store.collect()) == [0, 1, 2, 3]
    store.close()


def test_who_waits_for_pages_is_not_kept_waiting() -> None:
    def open_tier(is_stopped: Callable[[], bool]) -> MemoryTier:
        raise OSError(30, "Read-only file system")

    store = PrefixStore(
        [a_layer()], 4, CODECS["none"], lambda: Rates(1e9, 1.0, 96),
        tier=None, open_tier=open_tier, is_current=lambda: True, failure=OSError(30, "Read-only file system"),
    )  # fmt: skip
    assert (store.state, store.reason, store.can_spill) == ("off", "Read-only file system", False)
    store.publish(batch(KEYS, is_spilled=True), 0.1)
    assert all(map(store.has_given_up, KEYS))
    assert sorted(store.collect()) == [0, 1, 2, 3]
    store.flush()
    assert store.look_up(KEYS) == 0
    assert store.room() == (0, 0)
    store.close()


def test_a_tier_that_is_stuck_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.05)
    tier = MemoryTier()
    store = open_store(tier)
    tier.gate.clear()
    assert store.take(KEYS, 0) is None, "ask again"
    eventually(lambda: store.take(KEYS, 0) == Stored(0, 0))
    assert store.state == "off"
    assert store.recall(KEYS, 20) == []
    store.abandon(KEYS)
    store.lose(KEYS[0])
    store.pin(KEYS)
    tier.gate.set()
    eventually(lambda: store.state == "ready")
    eventually(lambda: KEYS[0] in tier.pinned)
    store.close()


def test_a_claim_that_nobody_comes_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "UNWANTED_SECONDS", 0.02)
    tier = MemoryTier()
    store = open_store(tier)
    tier.gate.clear()
    assert store.take(KEYS, 0) is None
    tier.gate.set()  # the request was cancelled meanwhile
    eventually(lambda: tier.claimed == set(KEYS) or not store._lookup.num_open)
    eventually(lambda: not tier.claimed and not store._lookup.num_open)
    store.close()


def test_a_page_that_was_lost_is_not_taken_again_until_it_is_written() -> None:
    tier = MemoryTier()
    store = open_store(tier)
    tier.keys = set(KEYS)
    assert store.take(KEYS, 0) == Stored(4, 0)
    tier.drop = lambda key: None  # type: ignore[method-assign]  # it is read-only
    store.lose(KEYS[2])
    assert store.take(KEYS, 0) == Stored(2, 0)
    store.publish(batch(KEYS), 0.1)
    store.flush()
    assert store.take(KEYS, 0) == Stored(4, 0)
    store.close()


def test_a_folder_that_was_replaced_is_opened_anew_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "CALM_SECONDS", 0.0)
    tier = MemoryTier()
    store = open_store(tier)
    tier.errors = {"contains": IndexReplaced("gone")}
    with caplog.at_level(logging.WARNING, logger="layerstream"):
        store._connection.ask(Question(lambda tier: tier.contains(KEYS)), 1.0)
        tier.errors = {}
        eventually(lambda: store.state == "ready")
    assert not caplog.records
    store.close()


def test_the_longer_it_fails_the_later_it_is_tried() -> None:
    outage = Outage()
    assert outage.seconds_left(0.0) == 0.0
    assert outage.failed(0.0, "a")
    waits = []
    now = 0.0
    for _ in range(10):
        waits.append(outage.seconds_left(now))
        now += waits[-1]
        assert not outage.failed(now, "b"), "it goes on"
    assert waits == pytest.approx(sorted(waits))
    assert waits[0] < waits[-1] <= LONGEST_SECONDS
    assert outage.failed(now + CALM_SECONDS + 1, "c")
    assert outage.seconds_left(now + CALM_SECONDS + 1) <= FIRST_SECONDS
