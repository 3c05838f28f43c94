"""What goes when room is needed: alone, and in a real folder."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.kv.keys import snapshot_key
from layerstream.store.eviction import Candidate, choose_victims
from layerstream.store.tiers.folder import Bounds
from layerstream.store.tiers.local import FOOTER_ALLOWANCE

from tests.store.pages import chain, expected, new_pages, open_tier, read_back
from tests.store.snapshots import new_snapshot


@st.composite
def forests(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(0, 20))
    return [
        Candidate(
            segment=number,
            parent=draw(st.none() | st.integers(0, number - 1)) if number else None,
            num_bytes=draw(st.integers(1, 100)),
            priority=draw(st.floats(0, 10)),
            pinned=draw(st.booleans()) and draw(st.booleans()),
        )
        for number in range(count)
    ]


@given(forests(), st.integers(0, 2000), st.sets(st.integers(0, 20)))
def test_leaves_first_and_never_what_must_stay(forest: list[Candidate], needed: int, in_use: set[int]) -> None:
    victims = choose_victims(forest, needed, in_use)
    by_id = {candidate.segment: candidate for candidate in forest}
    left = set(by_id)
    for victim in victims:
        assert not by_id[victim].pinned
        assert victim not in in_use
        left.remove(victim)
        assert all(by_id[other].parent != victim for other in left), "its child is still there"
    freed = sum(by_id[victim].num_bytes for victim in victims)
    if victims:
        assert freed - by_id[victims[-1]].num_bytes < needed, "no more than is needed"
    if freed < needed:
        free_leaves = [
            c
            for c in forest
            if c.segment in left
            and not c.pinned
            and c.segment not in in_use
            and all(by_id[o].parent != c.segment for o in left)
        ]
        assert not free_leaves, "something could still have gone"


def test_what_costs_much_and_is_used_often_stays() -> None:
    cheap = Candidate(1, None, 100, priority=0.1)
    dear = Candidate(2, None, 100, priority=5.0)
    assert choose_victims([dear, cheap], 50) == [1]
    assert choose_victims([dear, cheap], 150) == [1, 2]


@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_a_folder_keeps_to_its_bound_and_holds_no_orphans(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as name:
        size = open_tier(Path(name) / "a").put(new_pages(chain(0)))
        bound = 8 * size + 64 * 1024
        tier = open_tier(Path(name) / "b", bounds=Bounds(bound, 0))
        index = tier.folder.index
        held: list = []
        for _ in range(40):
            names = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
            keys = chain(*names)
            have = len(tier.contains(keys))
            if have < len(keys):
                tier.put(new_pages(keys[have:], keys[have - 1] if have else b"", seconds=rng.random()))
            elif rng.random() < 0.3:
                held.extend(tier.open(keys))
            if held and rng.random() < 0.3:
                run = held.pop()
                assert run._segment.path.exists(), "a segment in use is never removed"
                tier.opened._reader = type("R", (), {"forget": lambda self, path: None})()
                run.close()
            index.check_integrity()
            assert sum(path.stat().st_size for path in (Path(name) / "b").glob("*/*.kv")) <= bound
            for (key, layer), data in read_back(tier, keys).items():
                assert data == expected(key, layer)
        tier.folder.close()


def test_a_snapshot_goes_before_its_page_whatever_it_cost(tmp_path: Path) -> None:
    size = open_tier(tmp_path / "a").put(new_pages(chain(0)))
    tier = open_tier(tmp_path / "b", bounds=Bounds(2 * size + FOOTER_ALLOWANCE, 0))
    (page,), snapshot = chain(0), snapshot_key(chain(0)[0])
    assert tier.put(new_pages([page], seconds=1e-6))
    assert tier.put(new_snapshot(page, seconds=1e6))
    assert tier.put(new_pages(chain(1)))
    assert [facts.key for facts in tier.any_of([page, snapshot])] == [page]
    assert tier.put(new_pages(chain(2)))
    assert not tier.any_of([page, snapshot]), "it cost least"
    tier.close()


def test_what_is_continued_does_not_make_room_for_it(tmp_path: Path) -> None:
    size = open_tier(tmp_path / "a").put(new_pages(chain(0)))
    tier = open_tier(tmp_path / "b", bounds=Bounds(size + FOOTER_ALLOWANCE, 0))
    keys = chain(0, 1)
    assert tier.put(new_pages(keys[:1]))
    assert not tier.put(new_snapshot(keys[0]))
    assert not tier.put(new_pages(keys[1:], keys[0]))
    assert len(tier.contains(keys)) == 1
    assert tier.put(new_pages(chain(1))), "for others it does"
    tier.close()
