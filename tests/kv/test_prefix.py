"""Prefixes shared between sequences: accounting alone, then with the scheduler, then bit for bit in a model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream import LayerStream, SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.stepping import step_greedily

from tests.crossing import ALONE, crossed
from tests.harness import add_tokenizer, budget_for, draw_prompt, shrink_units
from tests.models import make_model

PAGE = 8
LIMITS = SweepLimits(max_tokens=20, chunk_tokens=PAGE, decode_rows=4)


def make(number: int, tokens: list[int], max_tokens: int = 2) -> Sequence:
    return Sequence(number, list(tokens), len(tokens), SamplingParams(max_tokens=max_tokens))


def make_scheduler(num_pages: int = 100) -> Scheduler:
    return Scheduler(LIMITS, PagePool(num_pages, PAGE))


def run_all(scheduler: Scheduler) -> list[Sweep]:
    sweeps = []
    while (sweep := scheduler.schedule()) is not None:
        sweeps.append(sweep)
        finish_sweep(scheduler, sweep)
    return sweeps


def finish_sweep(scheduler: Scheduler, sweep: Sweep) -> None:
    scheduler.commit(sweep)
    for sequence in sweep.sampled:
        sequence.token_ids.append(7)
        if sequence.num_output_tokens == sequence.params.max_tokens:
            scheduler.remove(sequence)
    scheduler.check_integrity()


def test_keys_say_all_that_comes_before() -> None:
    table = PrefixTable(PagePool(4, PAGE))
    keys = table.keys_of(list(range(3 * PAGE + 1)))
    assert len(keys) == 3
    assert len(table.keys_of(list(range(3 * PAGE)))) == 2, "the last token has to be sampled"
    other = table.keys_of([99, *range(1, 3 * PAGE + 1)])
    assert not set(keys) & set(other), "another first token is another prefix throughout"


def test_what_was_computed_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    context = list(range(30))
    for number, question in enumerate(([50, 51], [60, 61, 62])):
        scheduler.add(sequence := make(number, context + question))
        run_all(scheduler)
    assert sequence.tenancy.num_cached == 24
    assert len(scheduler.prefixes) == 4, "the page that both share once, and the first question's own page"


def test_questions_that_arrive_together_compute_their_context_once_in_the_same_sweep() -> None:
    scheduler = make_scheduler()
    context = list(range(16))
    sequences = [make(number, [*context, 50 + number]) for number in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    sweep = scheduler.schedule()
    assert sweep is not None
    assert sweep.num_tokens == 16 + 4
    assert set(sweep.sampled) == set(sequences)
    assert scheduler.pool.num_used == 2 + 4
    assert [sequence.tenancy.num_cached for sequence in sequences] == [0, 16, 16, 16]


def test_a_long_context_is_followed_over_several_sweeps() -> None:
    scheduler = make_scheduler()
    context = list(range(50))
    for number in range(3):
        scheduler.add(make(number, [*context, 60 + number]))
    sweeps = run_all(scheduler)
    assert sum(sweep.num_tokens for sweep in sweeps) == 51 + 2 * 3 + 3, "remainders of 3 tokens, one decoded token each"


def test_a_sharer_takes_over_when_the_owner_leaves() -> None:
    scheduler = make_scheduler()
    context = list(range(40))
    first, second, third = (make(number, [*context, 60 + number]) for number in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    sweep = scheduler.schedule()
    assert sweep is not None
    scheduler.commit(sweep)
    scheduler.remove(first)
    scheduler.check_integrity()
    assert (second.num_computed, third.num_computed) == (24, 40), "three pages are there; the second goes on from them"
    assert second.tenancy.num_cached == 24
    run_all(scheduler)
    assert second.num_output_tokens == third.num_output_tokens == 2


def test_pages_made_by_decoding_are_never_shared() -> None:
    scheduler = make_scheduler()
    scheduler.add(first := make(0, list(range(5)), max_tokens=20))
    run_all(scheduler)
    assert first.num_tokens == 25
    scheduler.add(second := make(1, [*first.token_ids, 1]))
    run_all(scheduler)
    assert second.tenancy.num_cached == 0


def test_idle_prefixes_make_room_the_oldest_and_their_ends_first() -> None:
    scheduler = make_scheduler(num_pages=6)
    old, new = list(range(17)), list(range(100, 117))
    for number, tokens in enumerate((old, new)):
        scheduler.add(make(number, tokens, max_tokens=1))
        run_all(scheduler)
    assert len(scheduler.prefixes) == 4
    scheduler.add(make(2, list(range(200, 217)), max_tokens=1))
    run_all(scheduler)
    keys = scheduler.prefixes.keys_of(old)
    assert len(scheduler.prefixes.match(keys)) == 1, "its second page went, and one of the first is left"
    assert len(scheduler.prefixes.match(scheduler.prefixes.keys_of(new))) == 2


def begin(table: PrefixTable, pool: PagePool, number: int, tokens: list[int]) -> Sequence | None:
    """A sequence of *tokens* that holds its pages, all of them computed; ``None`` if there are too few."""
    sequence = make(number, [*tokens, 0])
    keys = sequence.prefix_keys = table.keys_of(sequence.token_ids)
    shared = table.match(keys)
    own = pool.acquire(len(keys) - len(shared))
    if own is None:
        return None
    pool.share(shared)
    sequence.tenancy.pages = [*shared, *own]
    table.enter(keys, len(shared), sequence)
    sequence.tenancy.num_computed = len(keys) * PAGE
    table.publish(keys, sequence)
    return sequence


def test_pages_go_in_the_order_of_their_last_use_and_ends_first() -> None:
    pool = PagePool(9, PAGE)
    table = PrefixTable(pool)
    ones, twos, threes = ([number] * PAGE for number in (1, 2, 3))
    for number, tokens in enumerate((ones + ones + ones, ones + twos + twos, threes + threes)):
        sequence = begin(table, pool, number, tokens)
        assert sequence is not None
        assert sequence.pages == [[0, 1, 2], [0, 3, 4], [5, 6]][number]
        pool.release(sequence.pages)
    held = begin(table, pool, 3, twos)
    assert held is not None
    assert len(table.match(table.keys_of([*ones, *ones, *ones, 0]))) == 3, "the first is the newest now"
    before, gone = set(table.held_pages()), []
    while table.evict(1):
        table.check_integrity()
        gone += before - set(table.held_pages())
        before = set(table.held_pages())
    assert gone == [4, 3, 6, 5, 2, 1, 0]
    assert before == set(held.pages)
    pool.release(held.pages)
    assert table.evict(9) == 1


def idle_by_looking_at_all(table: PrefixTable, pool: PagePool) -> list[int]:
    """Pages in the order in which they are to go: the rule of the module, without a heap."""
    left, gone = dict(table._entries), []
    while True:
        parents = {entry.parent for entry in left.values()}
        idle = [e for e in left.values() if e.is_ready and e.key not in parents and pool.refcount(e.page) == 1]
        if not idle:
            return gone
        oldest = min(idle, key=lambda entry: (entry.last_used, -entry.position, entry.key))
        gone.append(left.pop(oldest.key).page)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_eviction_is_the_rule_applied_to_all(rng: random.Random) -> None:
    pool = PagePool(24, PAGE)
    table, running = PrefixTable(pool), list[Sequence]()

    def draw() -> list[int]:
        return [token for _ in range(rng.randrange(1, 6)) for token in [rng.randrange(2)] * PAGE]

    for number in range(60):
        match rng.randrange(4):
            case 0 | 1 if (sequence := begin(table, pool, number, draw())) is not None:
                running.append(sequence)
            case 2 if running:
                pool.release(running.pop(rng.randrange(len(running))).pages)
            case 3:
                table.match(table.keys_of([*draw(), 0]))
        expected, count = idle_by_looking_at_all(table, pool), rng.randrange(4)
        assert [table.count_idle(most) for most in (1, 5, 99)] == [min(most, len(expected)) for most in (1, 5, 99)]
        before = set(table.held_pages())
        assert table.evict(count) == min(count, len(expected))
        assert before - set(table.held_pages()) == set(expected[:count])
        table.check_integrity()


def test_what_an_eviction_looks_at_does_not_grow_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in pages whose holders are asked for."""
    for num_prompts in (10, 500):
        pool, looked = PagePool(4 * num_prompts, PAGE), [0]
        table = PrefixTable(pool)
        for number in range(num_prompts):
            sequence = begin(table, pool, number, [number] * (4 * PAGE))
            assert sequence is not None
            pool.release(sequence.pages)

        def refcount(page: int, count=pool.refcount, looked: list[int] = looked) -> int:
            looked[0] += 1
            return count(page)

        monkeypatch.setattr(pool, "refcount", refcount)
        for _ in range(20):
            assert table.count_idle(1) == table.evict(1) == 1
        assert looked[0] <= 20 * 4, f"{num_prompts} prompts"


@settings(max_examples=200)
@given(st.integers(10, 40), st.randoms(use_true_random=False))
def test_every_row_sees_exactly_its_own_tokens(num_pages: int, rng: random.Random) -> None:
    """A model of the pages' contents: what a row would read is what its sequence says, in every order of events."""
    scheduler = make_scheduler(num_pages)
    contents: dict[tuple[int, int], int] = {}
    contexts = [[rng.randrange(3) for _ in range(40)] for _ in range(2)]
    alive: list[Sequence] = []
    for number in range(60):
        if number < 30 and rng.random() < 0.7:
            tokens = rng.choice(contexts)[: rng.randrange(1, 40)] + [
                rng.randrange(50) for _ in range(rng.randrange(1, 9))
            ]
            alive.append(make(number, tokens, rng.randrange(1, 12)))
            scheduler.add(alive[-1])
        sweep = scheduler.schedule()
        scheduler.check_integrity()
        if sweep is None:
            continue
        for block in sweep.blocks:
            for span in block.spans:
                for position in range(span.start, span.stop):
                    page = span.sequence.pages[position // PAGE]
                    contents[page, position % PAGE] = span.sequence.token_ids[position]
            for span in block.spans:
                seen = [contents.get((span.sequence.pages[at // PAGE], at % PAGE)) for at in range(span.stop)]
                assert seen == span.sequence.token_ids[: span.stop]
        if rng.random() < 0.15:  # the sweep failed: all that it carried is gone
            for sequence in {span.sequence for _, span in sweep.spans()}:
                scheduler.remove(sequence)
                alive.remove(sequence)
        else:
            finish_sweep(scheduler, sweep)
            alive = [sequence for sequence in alive if sequence.num_output_tokens < (sequence.params.max_tokens or 0)]
        if alive and rng.random() < 0.2:
            scheduler.remove(victim := rng.choice(alive))
            alive.remove(victim)
        scheduler.check_integrity()
    run_all(scheduler)
    assert scheduler.pool.num_used == len(scheduler.prefixes)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_units(monkeypatch)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    crossed(
        ["llama", "gemma2", "qwen2-moe", "deepseek-v3", "qwen3_5_text", "nemotron_h"],
        ["resident", "layers", "cut"],
        ["float32", "bfloat16"],
        without=[ALONE],
    ),
)
def test_warm_is_bitwise_cold(family: str, mode: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    context = draw_prompt(150)
    prompts = [context + draw_prompt(20, seed) for seed in range(3)] + [draw_prompt(40)]
    config = EngineConfig(str(tmp_path), memory_bytes=budget_for(tmp_path, mode), dtype=dtype)

    def run(batches: list[list[list[int]]]) -> list[torch.Tensor]:
        parts = assemble(config, None)
        try:
            return [logits for batch in batches for logits in step_greedily(parts, batch, 4)[1]]
        finally:
            parts.reader.close()

    cold = [run([[prompt]])[0] for prompt in prompts]
    together = run([prompts])
    one_after_the_other = run([[prompt] for prompt in prompts])
    assert all(torch.equal(a, b) for a, b in zip(cold, together, strict=True)), "sharing within a sweep"
    assert all(torch.equal(a, b) for a, b in zip(cold, one_after_the_other, strict=True)), "reuse afterwards"


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_completions_say_how_many_tokens_were_there_already(
    family: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    context = draw_prompt(300)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with LayerStream(tmp_path) as engine:
        first = engine.generate([context], params)[0]
        second = engine.generate([context[:260] + draw_prompt(9)], params)[0]
        assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 256)
        copies = engine.generate([context[5:]], SamplingParams(max_tokens=2, ignore_eos=True, n=3, temperature=1.0))
        whole = 294 // engine.plan.page_tokens * engine.plan.page_tokens
        assert [completion.usage.cached_tokens for completion in copies] == [0, whole, whole]
        assert copies[0].metrics.sweeps == copies[2].metrics.sweeps
