"""States of recurrent layers outlive the process: found where they help, bit for bit, never without their pages."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.kv.keys import snapshot_key
from layerstream.kv.shape import StatePart, StateShape
from layerstream.kv.stored import PublishedState, Stored
from layerstream.store import leases
from layerstream.store.choice import Rates
from layerstream.store.leases import LEASE_SECONDS
from layerstream.store.loader import PagesLost
from layerstream.store.segment import padded, read_info
from layerstream.store.store import PrefixStore
from layerstream.store.tiers.folder import Bounds
from layerstream.store.tiers.local import LocalTier

from tests.store.memory_tier import MemoryTier, batch, open_store
from tests.store.pages import PAGE_TOKENS, SHAPES, chain, open_tier
from tests.store.snapshots import NUM_SLOTS, STATES, Memory, load_pages, load_state, opened, publish

KEYS = chain(*range(8))


def asked(store: PrefixStore, keys: Sequence[bytes], start: int, resumable: int | None = None) -> Stored:
    """Ask until there is an answer."""
    while (answer := store.take(keys, start, resumable)) is None:
        time.sleep(0.001)
    return answer


def take(store: PrefixStore, keys: Sequence[bytes], start: int, resumable: int | None = None) -> Stored:
    """What is to be loaded, and what to be computed."""
    return replace(asked(store, keys, start, resumable), num_known=0)


def test_what_is_stored_is_found_up_to_the_last_snapshot_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    memory = Memory()
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:7], [2, 5])
        assert sorted(store.collect()) == list(range(7))
        assert sorted(store.collect_slots()) == [0, 1]
        assert store.collect_slots() == [], "once"
        counted = store.counters
        assert (counted.written_pages, counted.written_snapshots, counted.skipped_snapshots) == (7, 2, 0)
        assert 2 * store.snapshot_bytes <= counted.written_snapshot_bytes < counted.written_bytes
    again = Memory()
    with opened(tmp_path, again) as store:
        assert store.look_up(KEYS) == 5
        assert take(store, KEYS, 0, 0) == Stored(5, 0, 5)
        load_pages(store, KEYS, range(5))
        load_state(store, KEYS[4], 3)
        assert all(again.has_page(KEYS[page], page) for page in range(5))
        assert again.has_state(KEYS[4], 3)
        assert store.state_loader.counters.num_bytes == store.snapshot_bytes
        assert take(store, KEYS, 3, 0) == Stored(2, 0, 5), "three pages are in memory"
        assert take(store, KEYS, 6, 2) == Stored(0, 0, 5), "so are all that lead to it"
        assert take(store, KEYS[:5], 5, 0) == Stored(0, 0, 5)
        assert take(store, KEYS[:4], 0, 0) == Stored(2, 0, 2)
        assert take(store, KEYS[:4], 4, 2) == Stored(0, 0, 0), "its states are in memory"
        assert take(store, KEYS, 5, 5) == Stored(0, 0, 0)
        assert take(store, chain("other"), 0, 0) == Stored(0, 0, 0)
        assert asked(store, KEYS, 0, 0).num_known == 7, "a snapshot may be worth having there"
        assert asked(store, KEYS[:4], 4, 2).num_known == 4
        assert asked(store, chain("other"), 0, 0).num_known == 0
        assert take(store, KEYS, 0) == Stored(7, 0), "as a model without recurrent layers asks"


def test_where_all_layers_are_recurrent_snapshots_alone_are_stored(tmp_path: Path) -> None:
    memory = Memory(num_layers=0)
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS, [3, 6])
        assert sorted(store.collect()) == list(range(8))
        assert sorted(store.collect_slots()) == [0, 1]
        assert store.count_stored(KEYS) == 8
    again = Memory(num_layers=0)
    with opened(tmp_path, again) as store:
        assert len([*tmp_path.rglob("*.kv")]) == 2
        assert store.look_up(KEYS) == 6
        assert take(store, KEYS, 0, 0) == Stored(6, 0, 6)
        load_pages(store, KEYS, range(6))
        load_state(store, KEYS[5], 1)
        assert again.has_state(KEYS[5], 1)
        other = open_tier(tmp_path)
        assert other.claim(KEYS), "nothing was"
        other.close()


@pytest.mark.parametrize(
    ("read_rate", "expected"), [(1e3, Stored(0, 3, 0)), (1e9, Stored(3, 0, 5))], ids=["slow", "fast"]
)
def test_what_is_faster_to_compute_is_not_loaded(read_rate: float, expected: Stored, tmp_path: Path) -> None:
    memory = Memory()
    rates = Rates(read_rate, 0.0, 96)
    with opened(tmp_path, memory, load="auto", rates=rates) as store:
        publish(store, memory, KEYS, [5])
        assert take(store, KEYS, 2, 1) == expected
        assert store.counters.declined_tokens == (4 * PAGE_TOKENS if not expected.snapshot else 0)
    with opened(tmp_path, memory, load="never") as store:
        assert take(store, KEYS, 2, 1) == Stored(0, 3, 0)


class TestDamage:
    """Whatever was done to a file: right, or lost; never wrong."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        memory = Memory()
        with opened(tmp_path, memory) as store:
            publish(store, memory, KEYS[:5], [2, 5])
        return tmp_path

    @staticmethod
    def path_of(folder: Path, key: bytes) -> Path:
        return next(path for path in folder.rglob("*.kv") if read_info(path).keys == (snapshot_key(key),))

    def test_bytes_that_changed(self, folder: Path) -> None:
        path = self.path_of(folder, KEYS[4])
        info, whole = read_info(path), path.read_bytes()
        starts, footer = info.layer_offsets, info.layer_offsets[-1]
        covered = [
            at for start, size in zip(starts, info.encoded_bytes, strict=False) for at in (start, start + size - 1)
        ]
        covered += [footer, (footer + len(whole)) // 2, *range(len(whole) - 24, len(whole))]
        padding = [start + size for start, size in zip(starts, info.encoded_bytes, strict=False) if size < padded(size)]
        with opened(folder, memory := Memory()) as store:
            assert take(store, KEYS, 5, 0) == Stored(0, 0, 5)
            for at in covered:
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
                with pytest.raises(PagesLost) as lost:
                    load_state(store, KEYS[4], 0)
                assert lost.value.key == snapshot_key(KEYS[4])
            for at in padding:
                path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
                load_state(store, KEYS[4], 1)
                assert memory.has_state(KEYS[4], 1), "that is read by nobody"

    @pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 5000), Path.unlink], ids=["cut off", "gone"])
    def test_what_is_lost_is_forgotten_and_written_again(self, spoil: Callable[[Path], None], folder: Path) -> None:
        with opened(folder, memory := Memory()) as store:
            assert take(store, KEYS, 0, 0) == Stored(5, 0, 5)
            spoil(self.path_of(folder, KEYS[4]))
            with pytest.raises(PagesLost) as lost:
                load_state(store, KEYS[4], 0)
            store.lose(lost.value.key)
            assert take(store, KEYS, 0, 0) == Stored(2, 0, 2), "the one before is whole"
            memory.compute_state(KEYS[4], 2)
            store.publish_state(PublishedState(KEYS[4], 2, PAGE_TOKENS), 1.0)
            store.flush()
            assert store.counters.lost_pages == 1
            assert take(store, KEYS, 0, 0) == Stored(5, 0, 5)
            load_state(store, KEYS[4], 3)
            assert memory.has_state(KEYS[4], 3)

    @pytest.mark.parametrize(
        "shapes",
        [STATES[:1], (*STATES, STATES[0]), (STATES[0], StateShape((StatePart("recurrent", (1030,), "bfloat16"),)))],
        ids=["fewer layers", "more layers", "another dtype"],
    )
    def test_states_of_another_shape(self, shapes: tuple[StateShape, ...], folder: Path) -> None:
        with opened(folder, Memory(shapes=shapes)) as store:
            assert take(store, KEYS, 5, 0) == Stored(0, 0, 5)
            with pytest.raises(PagesLost) as lost:
                load_state(store, KEYS[4], 0)
            assert lost.value.key == snapshot_key(KEYS[4])

    def test_a_page_that_is_lost_takes_its_snapshots_along(self, folder: Path) -> None:
        with opened(folder, Memory()) as store:
            store.lose(KEYS[3])
            assert take(store, KEYS, 0, 0) == Stored(2, 0, 2)
            assert take(store, KEYS[:5], 5, 0) == Stored(0, 0, 2)


def test_a_snapshot_whose_page_is_not_stored_is_not_either(tmp_path: Path) -> None:
    memory = Memory()
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:2], [])
        store.publish_state(PublishedState(KEYS[3], 5, PAGE_TOKENS), 1.0)
        store.flush()
        assert store.collect_slots() == [5]
        assert (store.counters.written_snapshots, store.counters.skipped_snapshots) == (0, 1)
        assert take(store, KEYS, 0, 0) == Stored(0, 0, 0)


def test_what_was_pinned_has_its_snapshots_pinned(tmp_path: Path) -> None:
    memory = Memory()
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:3], [3])
        publish(store, memory, chain("other"), [1])
        store.pin(KEYS[:4])
        publish(store, memory, KEYS[:4], [4])
    tier = open_tier(tmp_path)
    pinned = {
        key for row in tier.folder.index.segments() if row.pinned for key in tier.folder.index.keys_of(row.segment)
    }
    assert pinned == {*KEYS[:4], snapshot_key(KEYS[2]), snapshot_key(KEYS[3])}
    tier.close()


def test_one_that_another_process_is_about_to_write_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    other = open_tier(tmp_path)
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:5], [2])
        other.announce([snapshot_key(KEYS[4])])
        assert store.take(KEYS[:5], 0, 0) is None
        assert take(store, KEYS[:4], 0, 0) == Stored(2, 0, 2), "that lies beyond"
        other.unclaim([snapshot_key(KEYS[4])])
        assert take(store, KEYS[:5], 0, 0) == Stored(2, 0, 2)
        other.claim([chain("another")[0]])
        other.announce([snapshot_key(KEYS[4])])
        now = leases.time.time()
        monkeypatch.setattr(leases.time, "time", lambda: now + LEASE_SECONDS + 1)
        other.tick()
        assert take(store, KEYS[:5], 0, 0) == Stored(2, 0, 2), "nobody renews it"
    other.close()


def test_slots_that_are_given_back_are_not_written_and_come_back_once() -> None:
    tier, memory = MemoryTier(), Memory()
    store = open_store(tier, memory.recurrent)
    tier.gate.clear()
    for slot, key in enumerate(KEYS):
        store.publish(batch([key], slot), 0.1)
        store.publish_state(PublishedState(key, slot, PAGE_TOKENS), 0.1)
    given_back = store.give_back_slots()
    assert set(given_back) >= set(range(1, NUM_SLOTS)), "the first may be being written"
    tier.gate.set()
    store.flush()
    assert sorted([*given_back, *store.collect_slots()]) == list(range(NUM_SLOTS))
    assert sorted(store.collect()) == list(range(NUM_SLOTS)), "their pages were"
    assert tier.keys.issuperset(KEYS)
    assert not tier.keys & {snapshot_key(key) for key in KEYS[1:]}
    assert store.counters.skipped_snapshots == len(given_back)
    store.close()
    assert not tier.claimed


def test_a_store_that_is_read_only_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:5], [2])
    monkeypatch.setattr("layerstream.store.tiers.folder.os.access", lambda *_: False)
    with opened(tmp_path, memory) as store:
        assert take(store, KEYS, 0, 0) == Stored(2, 0, 2)
        load_state(store, KEYS[1], 7)
        assert memory.has_state(KEYS[1], 7)
        store.publish_state(PublishedState(KEYS[4], 3, PAGE_TOKENS), 1.0)
        store.flush()
        assert store.collect_slots() == [3]
        assert store.counters.skipped_snapshots == 1


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_whatever_happened_the_answer_is_the_best_and_can_be_loaded(rng: random.Random, is_hybrid: bool) -> None:
    """Pages and snapshots are written, lost and evicted, in a store that is nearly always full."""
    memory = Memory(len(SHAPES) if is_hybrid else 0)
    bound = 64 * 1024 + (6 * 48 if is_hybrid else 3 * 20) * 1024
    with tempfile.TemporaryDirectory() as name, opened(Path(name), memory, Bounds(bound, 0)) as store:
        assert isinstance(store.tier, LocalTier)
        index = store.tier.folder.index
        for _ in range(30):
            keys = chain(*(rng.randrange(2) for _ in range(rng.randrange(1, 7))))
            action = rng.random()
            if action < 0.4:
                publish(store, memory, keys, rng.sample(range(1, len(keys) + 1), rng.randrange(min(3, len(keys)) + 1)))
            elif action < 0.5:
                store.lose(rng.choice([rng.choice(keys), snapshot_key(rng.choice(keys))]))
                store.look_up(keys)  # by then it is dropped
            start = rng.randrange(len(keys) + 1)
            resumable = rng.randrange(start + 1)
            answer = take(store, keys, start, resumable)
            stored = [b for b in range(resumable + 1, len(keys) + 1) if index.find(1, [snapshot_key(keys[b - 1])])]
            best = max(stored, default=0)
            assert answer == Stored(max(0, best - start), 0, best)
            index.check_integrity()
            assert sum(path.stat().st_size for path in Path(name).rglob("*.kv")) <= bound
            if best:
                load_pages(store, keys, range(start, best))
                load_state(store, keys[best - 1], 7)
                assert all(memory.has_page(keys[page], page) for page in range(start, best))
                assert memory.has_state(keys[best - 1], 7)
