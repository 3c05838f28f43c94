"""Blended prompts in the books: every token is computed or moved once, whatever else happens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.passages import Passage
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.keys import page_keys
from layerstream.kv.pages import PagePool
from layerstream.scheduling.blending import Recompute
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler

PAGE = 4
LIMITS = SweepLimits(max_tokens=40, chunk_tokens=PAGE, decode_rows=4, prompt_rows=8)
HEAD = [1, 2, 3]
TEXTS = [list(range(100 * number, 100 * number + 17)) for number in range(1, 5)]


def blended(number: int, order: list[int], end: int = 5) -> tuple[Sequence, list[Sequence]]:
    """A prompt that has the texts of *order* in it, and the sequences that compute their contexts."""
    tokens, places = [*HEAD], list[tuple[int, int]]()
    for text in order:
        places.append((len(tokens), len(tokens) + len(TEXTS[text])))
        tokens += [*TEXTS[text], 9]
    tokens += range(1000 + 10 * number, 1000 + 10 * number + end)
    passages, contexts = [], []
    for at, (start, stop) in enumerate(places):
        context = [*HEAD, *tokens[start:stop], tokens[stop]]
        keys = page_keys(context, PAGE)
        passages.append(Passage(start, start + len(keys) * PAGE - len(HEAD), len(HEAD), tuple(keys)))
        params = SamplingParams(max_tokens=1)
        contexts.append(Sequence(100 * number + at, context, len(context), params, is_passage=True))
    params = SamplingParams(max_tokens=3)
    keys = page_keys(tokens, PAGE, passages=passages)
    sequence = Sequence(
        100 * number + 50, tokens, len(tokens), params, prefix_keys=keys, passages=tuple(passages), owes=tuple(contexts)
    )
    return sequence, contexts


def run(scheduler: Scheduler, sweep: Sweep) -> None:
    """Commit, as the loop does."""
    scheduler.commit(sweep)
    for sequence in {span.sequence for _, span in sweep.known_spans()}:
        if sequence.is_passage and sequence.is_prefilled:
            scheduler.remove(sequence)
    for sequence in sweep.sampled:
        sequence.token_ids.append(0)
        if sequence.num_output_tokens == sequence.params.max_tokens:
            scheduler.remove(sequence)


def covered(sweep: Sweep, sequence: Sequence) -> list[int]:
    """Positions of *sequence* that *sweep* computes or moves."""
    computed = [
        at for _, span in sweep.known_spans() if span.sequence is sequence for at in range(span.start, span.stop)
    ]
    if sequence in sweep.staying:
        return computed
    return sorted(computed + [at for move in sweep.moves.get(sequence, ()) for at in range(move.start, move.stop)])


def test_passages_are_moved_out_of_their_own_contexts_in_the_sweep_that_computes_those() -> None:
    scheduler = Scheduler(LIMITS, PagePool(100, PAGE), recompute=Recompute(share=0.0, first=2))
    sequence, contexts = blended(0, [0])
    for each in (*contexts, sequence):
        scheduler.add(each)
    sweep = scheduler.schedule()
    assert sweep is not None
    (move,) = sweep.moves[sequence]
    assert (move.start, move.stop, move.source, move.distance) == (5, 20, 5, 0)
    assert list(move.pages) == contexts[0].pages[:5]
    assert sweep.sampled == (sequence,), "nothing is sampled from a passage"
    assert covered(sweep, sequence) == list(range(sequence.num_prompt_tokens))
    run(scheduler, sweep)
    scheduler.check_integrity()
    assert sequence.num_blended == 15


def test_the_second_prompt_finds_what_the_first_has_computed() -> None:
    scheduler = Scheduler(LIMITS, PagePool(100, PAGE), recompute=Recompute(share=0.0, first=2))
    for number, order in enumerate(([0, 1], [1, 0])):
        sequence, contexts = blended(number, order)
        for each in (*contexts, sequence):
            scheduler.add(each)
        computed = 0
        while sequence.num_output_tokens < 3:
            sweep = scheduler.schedule()
            assert sweep is not None
            computed += sweep.num_tokens
            run(scheduler, sweep)
        assert sequence.num_blended == 30
        assert computed == (42 if number == 0 else 2) + 16, "of what is there, a context computes its last token alone"
    scheduler.check_integrity()


def test_what_was_blended_has_keys_that_no_exact_prompt_has() -> None:
    sequence, _ = blended(0, [0, 1])
    exact = page_keys(sequence.token_ids, PAGE)
    assert not set(exact) & set(sequence.prefix_keys)
    again, _ = blended(0, [0, 1])
    assert again.prefix_keys == sequence.prefix_keys
    whole = [Passage(23, 38, 3, ())]
    assert page_keys(sequence.token_ids, PAGE, passages=whole)[:5] == exact[:5], "what stands before a passage is exact"


@pytest.mark.parametrize("by_deviation", [False, True])
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), min_size=1, max_size=5),
    st.integers(18, 60),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_every_token_is_computed_or_moved_once(
    by_deviation: bool, orders: list[list[int]], num_pages: int, share: float, rng: random.Random
) -> None:
    recompute = Recompute(share, first=2, by_deviation=by_deviation)
    scheduler = Scheduler(LIMITS, PagePool(num_pages, PAGE), recompute=recompute)
    left: dict[Sequence, tuple[Sequence, ...]] = {}
    for number, order in enumerate(orders):
        sequence, contexts = blended(number, order)
        left[sequence] = tuple(contexts)
        for each in (*contexts, sequence):
            scheduler.add(each)
    for _ in range(400):
        if not left:
            break
        sweep = scheduler.schedule()
        assert sweep is not None, "somebody can always go on"
        for sequence in sweep.moves:
            assert covered(sweep, sequence) == list(
                range(sequence.num_computed, sequence.num_computed + len(covered(sweep, sequence)))
            )
        rows = {(span.sequence, at) for _, span in sweep.known_spans() for at in range(span.start, span.stop)}
        for sequence, moves in sweep.moves.items():
            moved = {(sequence, at) for move in moves for at in range(move.start, move.stop)}
            assert (moved <= rows) if sequence in sweep.staying else not moved & rows
            assert sweep.staying.get(sequence, 0) <= len(moved)
        run(scheduler, sweep)
        scheduler.check_integrity()
        done = [s for s in left if s.num_output_tokens == s.params.max_tokens]
        if rng.random() < 0.05:
            done.append(rng.choice(list(left)))  # it is cancelled, with what it owes
        for sequence in done:
            for each in (*left.pop(sequence, ()), sequence):
                scheduler.remove(each)
        scheduler.check_integrity()
    assert not left


def test_a_passage_that_is_not_there_any_more_is_computed_in_its_place() -> None:
    scheduler = Scheduler(LIMITS, PagePool(100, PAGE), recompute=Recompute(share=0.0, first=2))
    sequence, _ = blended(0, [0, 1])
    scheduler.add(sequence)  # and nobody computes the passages
    sequence.owes = ()
    computed = 0
    while sequence.num_output_tokens < 1:
        sweep = scheduler.schedule()
        assert sweep is not None
        assert not sweep.moves
        computed += sweep.num_tokens
        run(scheduler, sweep)
    assert computed == sequence.num_prompt_tokens
    assert sequence.num_blended == 0


@pytest.mark.parametrize(
    ("by_deviation", "decodes", "prompt_tokens", "again"),
    [
        (False, False, 0, 11),
        (False, True, 0, 6),
        (False, False, 6, 5),
        (False, True, 3, 3),
        (False, False, 15, 2),
        (True, False, 0, 11),
        (True, False, 6, 5),
        (True, False, 15, 2),
    ],
)
def test_what_rides_free_is_what_answers_and_prompts_before_it_leave(
    by_deviation: bool, decodes: bool, prompt_tokens: int, again: int
) -> None:
    recompute = Recompute(first=2, by_deviation=by_deviation)
    limits = replace(LIMITS, prompt_rows=0)
    scheduler = Scheduler(limits, PagePool(100, PAGE), read_seconds=lambda: 0.2 / 0.9 + 1e-6, recompute=recompute)
    scheduler.budget.observe(1, 0, 0.05)  # a block that decodes takes what five tokens of a prompt do
    scheduler.budget.observe(0, 100, 1.0)
    sequence, contexts = blended(0, [0])
    answer, prompt = (
        Sequence(n, [n] * most, most, SamplingParams(max_tokens=3)) for n, most in ((1, 2), (2, prompt_tokens))
    )
    for each in (*contexts, *([answer] if decodes else [])):
        scheduler.add(each)
    first = scheduler.schedule()
    assert first is not None
    run(scheduler, first)
    for each in (*([prompt] if prompt_tokens else []), sequence):
        scheduler.add(each)
    sweep = scheduler.schedule()
    assert sweep is not None
    assert covered(sweep, sequence) == list(range(sequence.num_prompt_tokens))
    assert sum(map(len, sweep.moves[sequence])) - sweep.staying.get(sequence, 0) == 17 - again


def test_blended_prompts_of_a_sweep_share_what_rides_free() -> None:
    scheduler = Scheduler(
        LIMITS, PagePool(100, PAGE), read_seconds=lambda: 0.4 / 0.9 + 1e-6, recompute=Recompute(first=2)
    )
    scheduler.budget.observe(0, 100, 1.0)
    both = [blended(number, [number]) for number in range(2)]
    for each in [context for _, contexts in both for context in contexts]:
        scheduler.add(each)
    while any(not context.is_prefilled for _, contexts in both for context in contexts):
        sweep = scheduler.schedule()
        assert sweep is not None
        run(scheduler, sweep)
    for sequence, _ in both:
        scheduler.add(sequence)
    sweep = scheduler.schedule()
    assert sweep is not None
    moved = [sum(map(len, sweep.moves.get(sequence, ()))) for sequence, _ in both]
    assert moved == [0, 17 - 5], "26 of 40 are the first one's, and of 14 are 9 behind the second one's passage"
