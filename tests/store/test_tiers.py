"""What a store relies on in a tier: the local one and the one of its tests keep to the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from layerstream.kv.keys import snapshot_key
from layerstream.store.tiers.base import Tier

from tests.store.memory_tier import MemoryTier
from tests.store.pages import chain, new_pages, open_tier
from tests.store.snapshots import new_snapshot

KEYS = chain(*range(4))
AFTER = [snapshot_key(key) for key in KEYS]


@pytest.fixture(params=[lambda path: MemoryTier(), open_tier], ids=["memory", "local"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    opening: Callable[[Path], Tier] = request.param
    tier = opening(tmp_path / "kv")
    assert tier.put(new_pages(KEYS[:3]))
    assert tier.put(new_snapshot(KEYS[0]))
    assert tier.put(new_snapshot(KEYS[2]))
    yield tier
    tier.close()


def test_a_prefix_ends_where_something_is_missing_and_the_rest_is_found_all_the_same(tier: Tier) -> None:
    def keys_of(found: list) -> list[bytes]:
        assert all(facts.num_bytes > 0 and facts.seconds > 0 for facts in found)
        return [facts.key for facts in found]

    assert keys_of(tier.contains(KEYS)) == list(KEYS[:3])
    assert keys_of(tier.contains(AFTER)) == AFTER[:1]
    assert keys_of(tier.any_of(AFTER)) == [AFTER[0], AFTER[2]]
    assert keys_of(tier.any_of([AFTER[3], AFTER[2], KEYS[1], AFTER[0]])) == [AFTER[2], KEYS[1], AFTER[0]], "in order"
    assert tier.any_of([]) == tier.any_of(chain("other")) == []


def test_many_are_looked_for_at_once(tier: Tier) -> None:
    keys = [AFTER[0], *chain(*range(1200)), AFTER[2]]
    assert [facts.key for facts in tier.any_of(keys)] == [AFTER[0], *KEYS[:3], AFTER[2]]


def test_what_is_dropped_is_gone(tier: Tier) -> None:
    tier.drop(AFTER[2])
    assert [facts.key for facts in tier.any_of(AFTER)] == AFTER[:1]
    assert len(tier.contains(KEYS)) == 3, "a page does not depend on its snapshot"


def test_ones_own_announcements_are_not_waited_for(tier: Tier) -> None:
    assert not tier.is_announced({AFTER[1]})
    tier.announce([AFTER[1]])
    assert not tier.is_announced({AFTER[1]})
    tier.unclaim([AFTER[1]])


def test_what_was_found_is_opened_whatever_lies_between(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv")
    tier.put(new_pages(KEYS[:3]))
    tier.put(new_snapshot(KEYS[2]))
    tier.close()
    tier = open_tier(tmp_path / "kv", reader=_Forgetful())
    assert not tier.open([AFTER[2]]), "nobody has looked for it"
    assert tier.any_of(AFTER)
    (run,) = tier.open([AFTER[2]])
    assert run.info.is_snapshot
    assert run.info.parent == KEYS[2]
    run.close()
    tier.close()


class _Forgetful:
    def forget(self, path: Path) -> None:
        """Nothing was opened."""
