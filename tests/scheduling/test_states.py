"""States of recurrent layers: every row goes on from exactly its own tokens, whoever shares, fails, waits or leaves."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import StateRoute, Sweep
from layerstream.kv.keys import snapshot_key
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import Published, PublishedState, Stored
from layerstream.runtime.steward import Steward
from layerstream.scheduling.packing import SweepLimits
from layerstream.scheduling.scheduler import Scheduler
from layerstream.scheduling.states import snapshot_stride

from tests.scheduling.test_frames import Chain, Memory

PAGE = 8
LIMITS = SweepLimits(max_tokens=20, chunk_tokens=PAGE, decode_rows=4, prompt_rows=16, max_draft_rows=6)
NOTHING: tuple[int, ...] = ()


class Slots:
    """What slots hold: the tokens that a state is the state after; also the swap that keeps them."""

    def __init__(self, num_slots: int, rng: random.Random | None = None) -> None:
        self.states: list[tuple[int, ...] | None] = [None] * num_slots
        self.kept: dict[int, tuple[int, ...] | None] = {}
        self._rng = rng

    def write(self, number: int, slots: Seq[int]) -> bool:
        if self._rng is not None and self._rng.random() < 0.2:
            return False
        self.kept[number] = self.states[slots[0]]
        return True

    def read(self, number: int, first: int, slots: Seq[int]) -> bool:
        if self._rng is not None and self._rng.random() < 0.2:
            return False
        self.states[slots[0]] = self.kept[number]
        return True

    def drop(self, number: int) -> None:
        self.kept.pop(number, None)

    def run(self, sweep: Sweep) -> None:
        """Every known row finds the state after the tokens before it, and leaves its own."""
        sources = {route.source for route in sweep.routes.values()}
        for _, span in sweep.known_spans():
            route, tokens = sweep.routes[span.sequence], span.sequence.token_ids
            before = route.before(span.start)
            found = NOTHING if before is None else self.states[before]
            assert found == tuple(tokens[: span.start]), "a row that goes on from something else"
            after = route.after(span.stop)
            assert after not in sources or any(after in dict(r.stops).values() for r in sweep.routes.values())
            self.states[after] = tuple(tokens[: span.stop])


class Store:
    """Keeps pages and snapshots, and loses some; nothing else."""

    can_spill = False

    def __init__(self, slots: Slots, rng: random.Random) -> None:
        self.pages: dict[bytes, tuple[int, ...]] = {}
        self.snapshots: dict[bytes, tuple[int, ...]] = {}
        self.frames: list[int] = []
        self.slots: list[int] = []
        self.unwritten: list[int] = []
        self._slots = slots
        self._rng = rng

    def take(self, keys: Seq[bytes], start: int, resumable: int | None = None) -> Stored | None:
        if self._rng.random() < 0.2:
            return None
        there = next((at for at, key in enumerate(keys[start:]) if key not in self.pages), len(keys) - start)
        assert resumable is not None
        places = range(start + there, resumable, -1)
        snapshot = next((count for count in places if snapshot_key(keys[count - 1]) in self.snapshots), 0)
        known = start + there
        return Stored(max(0, snapshot - start), there, snapshot, known) if snapshot else Stored(0, there, 0, known)

    def publish(self, published: Published, memory: Memory) -> None:
        for key, page in zip(published.keys, published.pages, strict=True):
            content = memory.pages[page]
            assert None not in content
            self.pages[key] = tuple(token for token in content if token is not None)
        self.frames += published.pages

    def publish_state(self, item: PublishedState) -> None:
        content = self._slots.states[item.slot]
        assert content is not None
        assert item.num_tokens > 0
        self.snapshots[snapshot_key(item.key)] = content
        (self.slots if self._rng.random() < 0.5 else self.unwritten).append(item.slot)

    def load(self, sweep: Sweep, memory: Memory) -> bytes | None:
        """Bring what *sweep* asks for; what is lost."""
        for load in sweep.loads:
            if load.key not in self.pages or self._rng.random() < 0.1:
                self.pages.pop(load.key, None)
                return load.key
            memory.pages[load.page] = list(self.pages[load.key])
        for load in sweep.state_loads:
            if load.key not in self.snapshots or self._rng.random() < 0.2:
                self.snapshots.pop(load.key, None)
                return load.key
            self._slots.states[load.page] = self.snapshots[load.key]
        return None

    def lose(self, key: bytes) -> None:
        self.pages.pop(key, None)

    def abandon(self, keys: Seq[bytes]) -> None:
        pass

    def collect(self) -> list[int]:
        done, self.frames = self.frames, []
        return done

    def give_back(self) -> list[int]:
        return self.collect()

    def collect_slots(self) -> list[int]:
        done, self.slots = self.slots, []
        return done

    def give_back_slots(self) -> list[int]:
        done, self.unwritten = self.unwritten, []
        return done


class World:
    """A scheduler with frames, slots and a store that hold tokens."""

    def __init__(self, num_pages: int, num_slots: int, stride: int = 2, rng: random.Random | None = None) -> None:
        self.memory = Memory(num_pages, rng, PAGE)
        self.slots = Slots(num_slots, rng)
        self.store = None if rng is None else Store(self.slots, rng)
        pool = PagePool(num_pages, PAGE)
        self.scheduler = Scheduler(
            LIMITS,
            pool,
            self.store,  # type: ignore[arg-type]
            can_swap=True,
            num_slots=num_slots,
            stride=stride,
        )
        self.steward = Steward(self.scheduler, self.memory, self.slots, self.store)  # type: ignore[arg-type]

    def run(self, sweep: Sweep) -> bool:
        """Compute *sweep*; False if a stored page or snapshot was lost, and it had no effect."""
        if self.store is not None and (lost := self.store.load(sweep, self.memory)) is not None:
            self.steward.lose(lost)
            self.scheduler.check_integrity()
            return False
        self.memory.run(sweep)
        self.slots.run(sweep)
        return True

    def commit(self, sweep: Sweep) -> None:
        pages, states = self.scheduler.commit(sweep)
        if self.store is not None:
            for published in pages:
                self.store.publish(published, self.memory)
            for state in states:
                self.store.publish_state(state)
        self.scheduler.check_integrity()

    def accept(self, sequence: Sequence, count: int) -> None:
        """The last *count* tokens of *sequence* but one were guessed, and right."""
        self.memory.accept(sequence, count)
        self.scheduler.accept(sequence, count)
        assert sequence.tenancy.state is not None
        self.slots.states[sequence.tenancy.state] = tuple(sequence.token_ids[: sequence.num_computed])


def make(number: int, tokens: list[int], max_tokens: int = 3) -> Sequence:
    return Sequence(number, list(tokens), len(tokens), SamplingParams(max_tokens=max_tokens))


def finish(world: World, *sequences: Sequence) -> int:
    """Run *sequences* to their end; prompt tokens that were computed for them."""
    left, computed = list(sequences), 0
    for sequence in left:
        world.scheduler.add(sequence)
    while left:
        sweep = world.steward.schedule()
        assert sweep is not None
        assert world.run(sweep)
        world.commit(sweep)
        computed += sum(len(span) for _, span in sweep.known_spans() if span.start < span.sequence.num_prompt_tokens)
        for sequence in sweep.sampled:
            sequence.token_ids.append(sequence.token_ids[-1] + 1)
            if sequence.num_output_tokens == sequence.params.max_tokens:
                world.steward.remove(sequence)
                left.remove(sequence)
    return computed


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_every_row_goes_on_from_its_own_tokens(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng.randint(6, 24), rng.randint(2, 9), rng.randint(1, 4), rng if rng.random() < 0.8 else None)
    base = [rng.randint(0, 3) for _ in range(40)]
    waiting = []
    for number in range(rng.randint(1, 7)):
        cut = rng.randint(1, 40)
        waiting.append(make(number, base[:cut] + [10 + number] * rng.randint(0, 5), rng.randint(1, 6)))
    here: list[Sequence] = []
    drafting = Chain(rng)
    for _ in range(3000):
        if waiting and rng.random() < 0.4:
            here.append(waiting.pop())
            world.scheduler.add(here[-1])
        if not here:
            if not waiting:
                break
            continue
        sweep = world.steward.schedule(drafting)
        world.scheduler.check_integrity()
        for sequence, _ in world.scheduler.take_failed():
            world.steward.remove(sequence)
            here.remove(sequence)
            waiting.append(make(sequence.sequence_id, sequence.token_ids[: sequence.num_prompt_tokens], 2))
        if sweep is None or any(sequence not in here for sequence in sweep.routes) or not world.run(sweep):
            continue
        if rng.random() < 0.1:  # it died at its end: nothing of it may be seen again
            continue
        world.commit(sweep)
        for sequence in sweep.sampled:
            tree, room = sweep.drafts.get(sequence), sequence.max_num_tokens - sequence.num_tokens
            count = 0 if tree is None else rng.randint(0, min(len(tree), room - 1))
            start = sequence.num_tokens
            guesses = [] if tree is None else list(tree.token_ids[:count])
            sequence.token_ids += [*guesses, rng.randint(0, 9)]
            if sequence.num_tokens == sequence.max_num_tokens or rng.random() < 0.05:
                world.steward.remove(sequence)
                here.remove(sequence)
            elif count:
                assert sequence.num_computed == start
                world.accept(sequence, count)
            world.scheduler.check_integrity()
    assert not here
    assert not waiting


def test_a_second_question_begins_where_the_document_ends() -> None:
    world = World(64, 10, stride=100)
    document = list(range(40))
    assert finish(world, make(0, [*document, 100])) == 41
    assert finish(world, make(1, [*document, 200, 201])) == 2, "its last page ends there"


def test_a_third_question_begins_where_the_second_parted() -> None:
    world = World(64, 10, stride=100)
    document = list(range(32))
    assert finish(world, make(0, [*document, *range(100, 124)])) == 56
    assert finish(world, make(1, [*document, *range(200, 224)])) == 56, "there is no snapshot there yet"
    assert finish(world, make(2, [*document, *range(300, 324)])) == 24


def test_prompts_that_part_in_different_processes_leave_a_snapshot_there() -> None:
    class Sure(random.Random):
        def random(self) -> float:
            return 0.99  # nothing is lost, nobody has to ask again

    document, computed, stored = list(range(32)), [], None
    for number in range(4):
        world = World(64, 10, stride=100, rng=Sure())
        assert world.store is not None
        if stored is not None:
            world.store.pages, world.store.snapshots = stored
        computed.append(finish(world, make(number, [*document, *range(100 * number, 100 * number + 24)])))
        stored = world.store.pages, world.store.snapshots
    assert computed == [56, 56, 24, 24]


def test_questions_that_come_at_once_compute_their_document_once() -> None:
    world = World(96, 24, stride=100)
    document = list(range(32))
    questions = [make(number, [*document, 100 + number, 101, 102]) for number in range(8)]
    assert finish(world, *questions) == 32 + 8 * 3


def test_a_state_is_kept_while_a_sweep_that_fails_is_repeated() -> None:
    world = World(16, 2)
    sequence = make(0, list(range(12)))
    world.scheduler.add(sequence)
    for _ in range(3):
        sweep = world.steward.schedule()
        assert sweep is not None
        world.slots.states[sweep.routes[sequence].target] = (99,)  # what a sweep that died has left
    assert world.run(sweep)
    world.commit(sweep)
    assert sequence.num_computed == 12


def test_who_has_no_second_slot_waits() -> None:
    world = World(64, 5)
    sequences = [make(number, [number] * 5, max_tokens=4) for number in range(4)]
    for sequence in sequences:
        world.scheduler.add(sequence)
    assert world.steward.schedule() is not None
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 2)


def test_beams_share_the_state_they_part_from() -> None:
    world = World(64, 8)
    parent = make(0, list(range(11)), max_tokens=6)
    world.scheduler.add(parent)
    sweep = world.steward.schedule()
    assert sweep is not None
    assert world.run(sweep)
    world.commit(sweep)
    child = Sequence(1, list(parent.token_ids), parent.num_prompt_tokens, parent.params, parent.prefix_keys)
    copied = world.steward.fork(parent, child)
    assert copied is not None
    world.memory.pages[copied[1]] = list(world.memory.pages[copied[0]])
    parent.token_ids.append(50)
    child.token_ids.append(60)
    sweep = world.steward.schedule()
    assert sweep is not None
    assert world.run(sweep)
    world.commit(sweep)
    assert parent.tenancy.state != child.tenancy.state


def test_the_newest_token_may_be_computed_again() -> None:
    """As a draft model does, level by level; after several tokens were accepted, too."""
    world = World(64, 6)
    sequence = make(0, list(range(11)), max_tokens=20)
    sequence.steps_back = True
    world.scheduler.add(sequence)
    for accepted in (0, 1, 3):
        sequence.token_ids += [50] * accepted
        for _ in range(3):
            sweep = world.steward.schedule()
            assert sweep is not None
            assert world.run(sweep)
            world.commit(sweep)
            num_rows = sweep.num_tokens
            world.scheduler.rewind(sequence, sequence.num_tokens - 1)
            world.scheduler.check_integrity()
        assert num_rows == 1 or not accepted, "a prompt's last chunk is not parted"
        sweep = world.steward.schedule()
        assert sweep is not None
        assert world.run(sweep)
        world.commit(sweep)


def test_a_route_knows_where_each_token_goes_on() -> None:
    route = StateRoute(8, 3, ((16, 4), (21, 5)))
    assert [route.before(at) for at in (8, 12, 16, 20)] == [3, 4, 4, 5]
    assert [route.after(at) for at in (12, 16, 17, 21)] == [4, 4, 5, 5]


@pytest.mark.parametrize(
    ("state_bytes", "kv_token_bytes", "pages"),
    [(0, 1000, 1), (127_000, 1000, 1), (129_000, 1000, 2), (10**9, 1000, 32), (10**9, 0, 32)],
)
def test_snapshots_cost_no_more_than_the_kv_between_them(state_bytes: int, kv_token_bytes: int, pages: int) -> None:
    assert snapshot_stride(state_bytes, kv_token_bytes, 128) == pages
