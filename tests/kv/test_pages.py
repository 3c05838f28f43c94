"""Page accounting and the tensors behind the pages."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerstream.kv.pages import PagePool
from layerstream.kv.state import LayerState, PageMemory


def test_neighbouring_pages_are_preferred_and_scattered_ones_taken_at_need() -> None:
    pool = PagePool(6, 4)
    assert pool.acquire(2) == [0, 1]
    assert pool.acquire(2) == [2, 3]
    pool.release([0, 1])
    assert pool.acquire(1) == [0]
    assert pool.acquire(2) == [4, 5]
    pool.release([2, 3])
    pool.release([0])
    assert pool.acquire(1) == [0]
    pool.release([4])
    assert pool.acquire(4) == [1, 2, 3, 4]
    assert pool.acquire(1) is None
    assert (pool.num_used, pool.peak_used) == (6, 6)


def test_a_shared_page_is_free_after_its_last_holder() -> None:
    pool = PagePool(2, 4)
    pages = pool.acquire(1)
    assert pages == [0]
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="free"):
        pool.release(pages)


@given(st.integers(1, 12), st.lists(st.integers(1, 5), max_size=40), st.randoms(use_true_random=False))
def test_counts_always_agree_with_the_page_tables(num_pages: int, wants: list[int], rng: random.Random) -> None:
    pool = PagePool(num_pages, 8)
    tables: list[list[int]] = []
    for want in wants:
        pages = pool.acquire(want)
        assert (pages is None) == (want > num_pages - len({page for table in tables for page in table}))
        if pages is not None:
            tables.append(pages)
        if tables and rng.random() < 0.3:
            shared = list(rng.choice(tables))
            pool.share(shared)
            tables.append(shared)
        while tables and rng.random() < 0.4:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check_integrity(tables)


@pytest.mark.parametrize("pages", [[1, 2, 3], [4, 0, 2]])
def test_what_is_appended_is_read_back(pages: list[int]) -> None:
    state = LayerState(num_pages=5, page_tokens=4, memory=PageMemory(0))
    keys, values = torch.randn(2, 11, 3), torch.randn(2, 11, 5)
    for start, stop in ((0, 7), (7, 8), (8, 11)):
        state.append(pages, start, keys[:, start:stop], values[:, start:stop])
    for start, stop in ((0, 11), (3, 9), (10, 11)):
        read_keys, read_values = state.read(pages, start, stop)
        assert torch.equal(read_keys, keys[:, start:stop])
        assert torch.equal(read_values, values[:, start:stop])
