"""The scheduler's decisions, row block by row block."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.pages import PagePool
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler

LIMITS = SweepLimits(max_tokens=20, chunk_tokens=8, decode_rows=4)


def make(number: int, num_tokens: int, max_tokens: int = 4) -> Sequence:
    tokens = list(range(100 * number, 100 * number + num_tokens))  # nothing in common with the others
    return Sequence(number, tokens, num_tokens, SamplingParams(max_tokens=max_tokens))


def shape(sweep: Sweep | None) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Per row block: (sequence, start, stop) of its spans, and its rows."""
    assert sweep is not None
    return [
        ([(span.sequence.sequence_id, span.start, span.stop) for span in block.spans], block.num_rows)
        for block in sweep.blocks
    ]


def commit(scheduler: Scheduler, sweep: Sweep) -> None:
    scheduler.commit(sweep)
    for sequence in sweep.sampled:
        sequence.token_ids.append(0)
        if sequence.num_output_tokens == sequence.params.max_tokens:
            scheduler.remove(sequence)


def test_prompts_are_chunked_from_position_zero_and_decodes_share_a_block() -> None:
    scheduler = Scheduler(LIMITS, PagePool(100, 8))
    scheduler.add(make(0, 19))
    scheduler.add(make(1, 3))
    scheduler.add(make(2, 9))
    sweep = scheduler.schedule()
    assert shape(sweep) == [([(0, 0, 8)], 8), ([(0, 8, 16)], 8), ([(0, 16, 19)], 3), ([(1, 0, 3)], 3)][:4]
    assert sweep is not None
    assert [sequence.sequence_id for sequence in sweep.sampled] == [0, 1]
    assert sweep.sampled_rows == (18, 21)
    commit(scheduler, sweep)
    sweep = scheduler.schedule()
    assert shape(sweep) == [([(2, 0, 8)], 8), ([(2, 8, 9)], 1), ([(0, 19, 20), (1, 3, 4)], 4)]
    assert sweep is not None
    assert sweep.sampled_rows == (9, 10, 8)
    assert sweep.blocks[2].num_padding == 2


def test_chunks_fill_whole_row_blocks() -> None:
    """A padded row costs what a used one does: beside decoding, prompts get whole blocks."""
    limits = SweepLimits(max_tokens=64, chunk_tokens=8, decode_rows=4, prompt_rows=16)
    scheduler = Scheduler(limits, PagePool(100, 8), read_seconds=lambda: 1.0)
    scheduler.budget.observe(1, 0, 0.9)  # nothing is free
    scheduler.budget.observe(0, 16, 16.0)
    scheduler.add(make(0, 4))
    sweep = scheduler.schedule()
    assert sweep is not None
    commit(scheduler, sweep)
    for number in (1, 2):
        scheduler.add(make(number, 12))
    sweep = scheduler.schedule()
    assert shape(sweep) == [([(1, 0, 8), (1, 8, 12)], 16), ([(0, 4, 5)], 4)]
    assert sweep is not None
    commit(scheduler, sweep)
    assert shape(scheduler.schedule())[0] == ([(2, 0, 8), (2, 8, 12)], 16)


def test_one_sequence_per_block_where_the_model_needs_it() -> None:
    limits = SweepLimits(max_tokens=20, chunk_tokens=8, decode_rows=4, one_sequence_per_block=True)
    scheduler = Scheduler(limits, PagePool(100, 8))
    for number in range(2):
        scheduler.add(make(number, 2))
    sweep = scheduler.schedule()
    assert sweep is not None
    commit(scheduler, sweep)
    assert shape(scheduler.schedule()) == [([(0, 2, 3)], 4), ([(1, 2, 3)], 4)]


def test_a_sequence_waits_until_its_longest_answer_fits() -> None:
    scheduler = Scheduler(LIMITS, PagePool(3, 8))
    scheduler.add(make(0, 8, max_tokens=8))
    scheduler.add(make(1, 8, max_tokens=8))
    scheduler.add(make(2, 1, max_tokens=1))
    assert shape(scheduler.schedule()) == [([(0, 0, 8)], 8)]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2), "arrival order: the small one does not overtake"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(8, 20),
    st.randoms(use_true_random=False),
)
def test_everything_finishes_once_without_gaps(
    requests: list[tuple[int, int]], num_pages: int, rng: random.Random
) -> None:
    scheduler = Scheduler(LIMITS, PagePool(num_pages, 8))
    waiting = [make(number, *request) for number, request in enumerate(requests)]
    everyone = list(waiting)
    cancelled: set[int] = set()
    for _ in range(2000):
        while waiting and rng.random() < 0.5:
            scheduler.add(waiting.pop(0))
        sweep = scheduler.schedule()
        scheduler.check_integrity()
        if sweep is None:
            if not waiting:
                break
            continue
        computed = {}
        for _, span in sweep.spans():
            assert span.start == computed.get(span.sequence, span.sequence.num_computed), "rows in order, no gap"
            computed[span.sequence] = span.stop
        assert set(sweep.sampled) == {s for s, stop in computed.items() if stop == s.num_tokens}
        assert sweep.num_tokens <= LIMITS.max_tokens + LIMITS.chunk_tokens + scheduler.num_running
        commit(scheduler, sweep)
        victims = [s for s in everyone if s.pages and s.num_output_tokens and rng.random() < 0.05]
        for victim in victims:
            scheduler.remove(victim)
            cancelled.add(victim.sequence_id)
    for sequence in everyone:
        done = sequence.num_output_tokens == sequence.params.max_tokens
        assert done or sequence.sequence_id in cancelled
    assert scheduler.pool.num_used == len(scheduler.prefixes), "only idle prefixes are left"


def test_a_prompt_has_pages_to_the_end_of_its_last_chunk_where_they_are_free() -> None:
    """It attends in the shape of a whole chunk; without pages there, all of its past would be copied to be padded."""
    for num_pages, expected in ((100, 6), (6, 6), (5, 5), (4, 4)):
        scheduler = Scheduler(LIMITS, PagePool(num_pages, 4))
        sequence = make(0, 15 if num_pages < 5 else 17, max_tokens=1)
        scheduler.add(sequence)
        assert scheduler.schedule() is not None
        assert len(sequence.pages) == expected, f"{num_pages} frames"
        scheduler.check_integrity()


def test_pages_behind_a_prompt_are_given_to_who_needs_them() -> None:
    scheduler = Scheduler(LIMITS, PagePool(9, 4))
    first, second = make(0, 17, max_tokens=1), make(1, 15, max_tokens=1)
    scheduler.add(first)
    assert scheduler.schedule() is not None
    assert len(first.pages) == 6
    scheduler.add(second)
    sweep = scheduler.schedule()
    assert sweep is not None
    assert scheduler.num_running == 2
    scheduler.check_integrity()
