"""The ring's allocator under arbitrary orders of acquiring and releasing."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from layerstream.core.sizes import PAGE
from layerstream.hardware.arena import Arena
from layerstream.streaming.ring import RingAllocator


@given(st.integers(1, 40), st.lists(st.integers(1, 12 * PAGE), max_size=60), st.randoms(use_true_random=False))
def test_intervals_never_overlap(num_pages: int, sizes: list[int], rng: random.Random) -> None:
    ring = RingAllocator(num_pages * PAGE)
    live: list[int] = []
    for size in sizes:
        offset = ring.acquire(size)
        if offset is not None:
            live.append(offset)
        elif not live:
            assert size > ring.capacity, "an empty ring grants whatever fits"
        ring.check_integrity()
        while live and rng.random() < 0.4:
            ring.release(live.pop(rng.randrange(len(live))))
            ring.check_integrity()


def test_goes_round_and_takes_places_released_out_of_order() -> None:
    ring = RingAllocator(4 * PAGE)
    first, second = ring.acquire(2 * PAGE), ring.acquire(PAGE)
    assert (first, second) == (0, 2 * PAGE)
    assert ring.acquire(2 * PAGE) is None
    ring.release(0)
    assert ring.acquire(PAGE) == 3 * PAGE
    assert ring.acquire(2 * PAGE) == 0
    assert ring.live_bytes == 4 * PAGE


def test_arena_is_page_aligned_and_one_memory() -> None:
    arena = Arena(PAGE + 1)
    assert arena.num_bytes == 2 * PAGE
    assert arena.tensor.data_ptr() % PAGE == 0
    arena.view[5] = 7
    assert arena.tensor[5] == 7
