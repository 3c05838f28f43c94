"""States of recurrent layers outlive the process: found where they help, bit for bit, never without their pages."""

from __future__ import annotations

from pathlib import Path

from layerstream.kv.prefix import Stored

from tests.store.pages import chain
from tests.store.snapshots import Memory, load, opened, publish

KEYS = chain(*range(8))


def test_what_is_stored_is_found_up_to_the_last_snapshot_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    memory = Memory()
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS[:7], [2, 5])
        assert sorted(store.collect()) == list(range(7))
        assert sorted(store.collect_slots()) == [0, 1]
        assert store.collect_slots() == [], "once"
    again = Memory()
    with opened(tmp_path, again) as store:
        assert store.take(KEYS, 0, 0) == Stored(5, 0, 5)
        load(store, KEYS, range(5), 5, 3)
        assert all(again.has_page(KEYS[page], page) for page in range(5))
        assert again.has_state(KEYS[4], 3)
        assert store.take(KEYS, 3, 0) == Stored(2, 0, 5), "three pages are in memory"
        assert store.take(KEYS, 6, 2) == Stored(0, 0, 5), "so are all that lead to it"
        assert store.take(KEYS[:5], 5, 0) == Stored(0, 0, 5)
        assert store.take(KEYS[:4], 0, 0) == Stored(2, 0, 2)
        assert store.take(KEYS[:4], 4, 2) == Stored(0, 0, 0), "its states are in memory"
        assert store.take(KEYS, 0, 5) == Stored(0, 0, 0)
        assert store.take(chain("other"), 0, 0) == Stored(0, 0, 0)
        assert store.take(KEYS, 0) == Stored(7, 0), "as a model without recurrent layers asks"


def test_where_all_layers_are_recurrent_snapshots_alone_are_stored(tmp_path: Path) -> None:
    memory = Memory(num_layers=0)
    with opened(tmp_path, memory) as store:
        publish(store, memory, KEYS, [3, 6])
        assert sorted(store.collect()) == list(range(8))
        assert sorted(store.collect_slots()) == [0, 1]
    again = Memory(num_layers=0)
    with opened(tmp_path, again) as store:
        assert store.take(KEYS, 0, 0) == Stored(6, 0, 6)
        load(store, KEYS, range(6), 6, 1)
        assert again.has_state(KEYS[5], 1)
