"""Memory for KV when there is little: nobody starves, nothing is lost, nothing is computed twice without need."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.kv.pages import PagePool
from layerstream.runtime.steward import Steward
from layerstream.scheduling.decisions import Resume, Suspend
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.scheduling.verify import verify

PAGE = 4
LIMITS = SweepLimits(max_tokens=20, chunk_tokens=2 * PAGE, decode_rows=4, prompt_rows=16, max_draft_rows=6)


class Memory:
    """What frames hold: the token of each position, as a stand-in for its KV; also the swap that keeps them."""

    def __init__(self, num_pages: int, rng: random.Random | None = None, page_tokens: int = PAGE) -> None:
        self.pages: list[list[int | None]] = [[None] * page_tokens for _ in range(num_pages)]
        self.kept: dict[int, list[list[int | None]]] = {}
        self.num_rows = 0
        self._rng = rng

    def write(self, number: int, pages: Seq[int]) -> bool:
        if self._rng is not None and self._rng.random() < 0.2:
            return False  # the disk is full
        assert number not in self.kept
        self.kept[number] = [list(self.pages[page]) for page in pages]
        return True

    def read(self, number: int, first: int, pages: Seq[int]) -> bool:
        if number not in self.kept:
            assert self._rng is not None, "it was written"
            return False
        contents = self.kept[number][first:]
        assert len(contents) == len(pages)
        if self._rng is not None and self._rng.random() < 0.2:
            return False  # the disk does not give them
        for page, content in zip(pages, contents, strict=True):
            self.pages[page] = list(content)
        return True

    def drop(self, number: int) -> None:
        self.kept.pop(number, None)

    def run(self, sweep: Sweep) -> None:
        """Every known row finds the tokens before it, and leaves its own."""
        for _, span in sweep.known_spans():
            sequence = span.sequence
            for position in range(span.start, span.stop):
                self._put(sequence, position)
                self.num_rows += 1
            found = [token for page in sequence.pages for token in self.pages[page]][: span.stop]
            assert found == sequence.token_ids[: span.stop], "a row that attends to something else"

    def accept(self, sequence: Sequence, count: int) -> None:
        for position in range(sequence.num_computed, sequence.num_computed + count):
            self._put(sequence, position)

    def _put(self, sequence: Sequence, position: int) -> None:
        number, within = divmod(position, len(self.pages[0]))
        self.pages[sequence.pages[number]][within] = sequence.token_ids[position]


class Chain:
    """Guesses the next few tokens as one path; tokens count up by 1, and some guesses are off."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def propose(self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int) -> dict[Sequence, DraftTree]:
        trees = {}
        for sequence in sequences:
            room = min(sequence.tenancy.capacity, sequence.max_num_tokens - 1) - sequence.num_tokens
            count = min(room, self._rng.randint(0, 3))
            if count > 0:
                last = sequence.token_ids[-1]
                tokens = [last + 1 + at + (self._rng.random() < 0.3) for at in range(count)]
                trees[sequence] = DraftTree(tuple(tokens), tuple(range(ROOT, count - 1)), ("test",) * count)
        return trees


def make(number: int, num_tokens: int, max_tokens: int, context: int) -> Sequence:
    """Prompts of one *context* begin with the same tokens."""
    shared = [10_000 * context + at for at in range(min(num_tokens, 20))]
    own = [10_000_000 + 1000 * number + at for at in range(num_tokens - len(shared))]
    return Sequence(number, shared + own, num_tokens, SamplingParams(max_tokens=max_tokens), priority=number % 3 // 2)


def make_steward(num_pages: int, memory: Memory) -> Steward:
    return Steward(Scheduler(LIMITS, PagePool(num_pages, PAGE), can_swap=True), memory, memory, None)  # type: ignore[arg-type]


def go_on(steward: Steward, memory: Memory, sweep: Sweep) -> None:
    """Run, commit and sample: the next token is always the last one's successor."""
    memory.run(sweep)
    steward.scheduler.commit(sweep)
    for sequence in sweep.sampled:

        def draw(node: int, sequence: Sequence = sequence) -> tuple[list[int], bool]:
            sequence.token_ids.append(sequence.token_ids[-1] + 1)
            return sequence.token_ids[-1:], sequence.num_tokens < sequence.max_num_tokens

        right = verify(sweep.drafts.get(sequence), draw)
        if sequence.num_tokens == sequence.max_num_tokens:
            steward.remove(sequence)
        else:
            memory.accept(sequence, len(right))
            steward.scheduler.accept(sequence, len(right))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=10),
    st.integers(20, 32),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_everybody_finishes_with_what_they_computed(
    requests: list[tuple[int, int, int]], num_pages: int, is_flaky: bool, rng: random.Random
) -> None:
    finish(requests, num_pages, rng, is_flaky=is_flaky)


def test_who_was_suspended_waits_for_what_it_shares() -> None:
    """Its prefix is evicted meanwhile, and somebody else's to compute when it goes on."""
    memory = Memory(20)
    steward = make_steward(20, memory)
    scheduler = steward.scheduler
    greedy, asked = make(0, 4, 74, 0), make(1, 9, 12, 1)  # greedy needs all twenty pages in the end
    scheduler.add(greedy)
    while greedy.num_tokens < greedy.max_num_tokens:
        if greedy.num_tokens == 56:
            scheduler.add(asked)
        sweep = steward.schedule()
        assert sweep is not None
        go_on(steward, memory, sweep)
    assert asked.tenancy.suspension is not None
    assert scheduler.count_cached(asked.prefix_keys) == 0
    large, same = make(3, 40, 2, 2), make(4, 9, 2, 1)
    large.priority = same.priority = 9  # whatever the other has gained by waiting
    for sequence in (large, same):
        scheduler.add(sequence)
    sweep = steward.schedule()
    assert sweep is not None
    assert asked.is_prefilled
    assert asked.pages[:2] == same.pages[:2]
    assert {span.sequence for _, span in sweep.spans()} == {large}, "the pages that both share are not there yet"
    while sweep is not None:
        go_on(steward, memory, sweep)
        sweep = steward.schedule()
    assert [sequence.num_output_tokens for sequence in (asked, large, same)] == [12, 2, 2]


def finish(requests: list[tuple[int, int, int]], num_pages: int, rng: random.Random, *, is_flaky: bool) -> None:
    """Ask *requests*, prompt and answer tokens and context of each, and cancel some."""
    memory = Memory(num_pages, rng if is_flaky else None)
    steward = make_steward(num_pages, memory)
    scheduler = steward.scheduler
    chain = Chain(rng)
    arriving = [make(number, *request) for number, request in enumerate(requests)]
    everyone, cancelled = list(arriving), set()
    for _ in range(3000):
        while arriving and rng.random() < 0.4:
            scheduler.add(arriving.pop(0))
        sweep = steward.schedule(chain)
        scheduler.check_integrity()
        if sweep is None:
            if not arriving and not scheduler.num_waiting:
                break
            assert scheduler.num_waiting == 0 or scheduler.num_running == 0 or arriving
            continue
        go_on(steward, memory, sweep)
        for sequence in everyone:
            if sequence.num_tokens < sequence.max_num_tokens and sequence not in arriving and rng.random() < 0.02:
                steward.remove(sequence)
                everyone.remove(sequence)
                cancelled.add(sequence)
                break
    for sequence in everyone:
        start = sequence.token_ids[sequence.num_prompt_tokens - 1]
        assert sequence.output_ids == [start + 1 + at for at in range(sequence.params.max_tokens or 0)]
    assert not memory.kept, "what was written was read again, or dropped"
    assert scheduler.pool.num_used == len(scheduler.prefixes), "only idle prefixes are left"


def test_a_suspended_sequence_computes_nothing_again() -> None:
    memory = Memory(12)
    steward = make_steward(12, memory)
    scheduler = steward.scheduler
    both = [make(number, 15, 33, number) for number in range(2)]  # twelve pages each, and there are twelve
    for sequence in both:
        scheduler.add(sequence)
    suspended = False
    while scheduler.num_running or scheduler.num_waiting:
        sweep = steward.schedule()
        assert sweep is not None
        scheduler.check_integrity()
        suspended |= any(sequence.tenancy.suspension is not None for sequence in both)
        assert both[0].tenancy.suspension is None, "the one that came first goes on"
        go_on(steward, memory, sweep)
    assert suspended
    assert memory.num_rows == 2 * (15 + 33 - 1)


def test_room_that_was_reserved_and_not_reached_is_given_up_first() -> None:
    memory = Memory(16)
    steward = make_steward(16, memory)
    scheduler = steward.scheduler
    scheduler.add(first := make(0, 4, 60, 0))
    sweep = steward.schedule()
    assert sweep is not None
    assert len(first.pages) == 16, "as long as nobody else wants them"
    go_on(steward, memory, sweep)
    scheduler.add(second := make(1, 9, 4, 1))
    sweep = steward.schedule()
    assert second.pages
    assert first.tenancy.suspension is None
    scheduler.check_integrity()


def test_what_is_decided_about_a_suspended_sequence_is_said_page_by_page() -> None:
    """Whoever is asked for the next sweep does nothing of it."""
    memory = Memory(12)
    steward = make_steward(12, memory)
    scheduler = steward.scheduler
    first, second = (make(number, 15, 33, number) for number in range(2))
    for sequence in (first, second):
        scheduler.add(sequence)
    found = []
    while scheduler.num_running or scheduler.num_waiting:
        sweep = scheduler.schedule()
        assert sweep is not None
        for decision in iter(scheduler.next_decision, None):
            found.append(decision)
            if isinstance(decision, Suspend):
                assert memory.write(0, decision.pages)
            else:
                assert memory.read(0, decision.first, decision.pages)
        go_on(steward, memory, sweep)
    assert found == [Suspend(second, (7, 8, 9, 10, 11, 6)), Resume(second, 0, (3, 4, 5, 6, 7, 8))]


@pytest.mark.parametrize("broken", ["write", "read"])
def test_what_was_not_kept_is_computed_again(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(12)
    steward = make_steward(12, memory)
    monkeypatch.setattr(memory, broken, lambda *args: False)
    for sequence in (both := [make(number, 15, 33, number) for number in range(2)]):
        steward.scheduler.add(sequence)
    while (sweep := steward.schedule()) is not None:
        steward.scheduler.check_integrity()
        go_on(steward, memory, sweep)
    assert [sequence.num_output_tokens for sequence in both] == [33, 33]
    assert memory.num_rows > 2 * (15 + 33 - 1)
    assert not steward.scheduler.take_failed()
    assert not memory.kept


def test_a_fault_in_bringing_pages_back_is_that_sequences_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> bool:
        raise RuntimeError("a fault")

    memory = Memory(12)
    steward = make_steward(12, memory)
    monkeypatch.setattr(memory, "read", read)
    first, second = (make(number, 15, 33, number) for number in range(2))
    for sequence in (first, second):
        steward.scheduler.add(sequence)
    failed: list[Sequence] = []
    while steward.scheduler.num_running or steward.scheduler.num_waiting:
        sweep = steward.schedule()
        steward.scheduler.check_integrity()
        if found := steward.scheduler.take_failed():
            failed += [sequence for sequence, error in found if str(error) == "a fault"]
            steward.remove(second)
        elif sweep is not None:
            go_on(steward, memory, sweep)
    assert failed == [second]
    assert first.num_output_tokens == 33
    assert not memory.kept
    assert steward.scheduler.pool.num_used == len(steward.scheduler.prefixes)
