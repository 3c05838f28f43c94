"""Which experts stay: invariants under any use, and how often what is wanted is there on recorded routings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layerstream.streaming.experts.cache import LARGEST_USE, ExpertCache

from benchmarks.routings import clairvoyant_hits, draw_routing, lru_hits, requests, static_hits


class CacheMachine(RuleBasedStateMachine):
    """Reads, computes and fails in any order; what is held keeps its slot, and nobody is in two places."""

    @initialize(num_slots=st.integers(1, 6), num_experts=st.integers(2, 12))
    def begin(self, num_slots: int, num_experts: int) -> None:
        self.cache = ExpertCache(num_slots, num_experts, half_life=3)
        self.num_experts = num_experts
        self.held: dict[int, int] = {}
        self.wanted: set[int] = set()

    @rule()
    def sweep(self) -> None:
        self.cache.begin_sweep()

    @precondition(lambda self: not self.held)
    @rule(data=st.data())
    def want(self, data: st.DataObject) -> None:
        wanted = sorted(data.draw(st.sets(st.integers(0, self.num_experts - 1), min_size=1)))
        there = [expert for expert in wanted if self.cache.is_there(expert)]
        missing = self.cache.want(wanted, [1 / len(wanted)] * len(wanted))
        assert sorted([*there, *missing]) == wanted
        self.wanted = set(wanted)

    @rule(expert=st.integers(0, 11))
    def place(self, expert: int) -> None:
        if expert >= self.num_experts or self.cache.is_there(expert):
            return
        slot = self.cache.place(expert)
        if slot is None:
            before = [other for other in self.wanted if other < expert and self.cache.is_there(other)]
            assert len({*before, *self.held}) == self.cache.num_slots, "a slot is refused that might be taken"
            return
        assert slot not in self.held.values(), "a slot in use was given away"
        self.held[expert] = slot

    @rule(expert=st.integers(0, 11))
    def hold(self, expert: int) -> None:
        if self.cache.is_there(expert):
            slot = self.cache.hold(expert)
            assert self.held.setdefault(expert, slot) == slot

    @precondition(lambda self: self.held)
    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data: st.DataObject, failed: bool) -> None:
        expert = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[expert]
        if failed:
            self.cache.drop(expert)
            assert not self.cache.is_there(expert)
        else:
            self.cache.let_go(expert)
            self.wanted.discard(expert)

    @invariant()
    def is_consistent(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for expert, slot in self.held.items():
            assert self.cache.is_there(expert), "a held expert went"
            assert self.cache.hold(expert) == slot, "a held expert moved"


TestCacheMachine = CacheMachine.TestCase


@given(st.integers(1, 5), st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=30))
@settings(max_examples=100)
def test_a_layer_is_always_served(num_slots: int, layers: list[set[int]]) -> None:
    """In the order that the bank goes by: those that come first are never pushed out by those that come later."""
    cache = ExpertCache(num_slots, 10)
    for wanted in map(sorted, layers):
        cache.begin_sweep()
        cache.want(wanted, [1.0] * len(wanted))
        for expert in wanted:
            if not cache.is_there(expert):
                assert cache.place(expert) is not None
            cache.hold(expert)
            cache.let_go(expert)
            cache.check_integrity()


def test_counts_do_not_overflow() -> None:
    cache = ExpertCache(1, 4, half_life=0.01)
    for _ in range(20):
        cache.begin_sweep()
        cache.want([2], [1.0])
    assert cache.shares()[2] == pytest.approx(1.0)
    assert np.isfinite(cache.shares()).all()
    assert cache.shares().max() < LARGEST_USE
    assert cache.hottest(1) == [2]


def test_what_is_known_from_before_counts() -> None:
    cache = ExpertCache(2, 4)
    cache.restore([0.0, 3.0, 1.0, 2.0])
    assert sorted(cache.hottest(2)) == [1, 3]


def test_without_knowledge_every_layer_gets_some() -> None:
    cache = ExpertCache(40, 400)
    of_layer = np.bincount(np.array(cache.hottest(cache.num_slots)) // 100, minlength=4)
    assert of_layer.sum() == 40
    assert of_layer.min() >= 8


@pytest.mark.parametrize("exponent", [1.0, 1.4])
def test_skewed_routings_hit_more_than_with_lru(exponent: float) -> None:
    routing = draw_routing(num_layers=6, num_experts=64, top_k=4, num_sweeps=300, exponent=exponent, seed=1)
    slots = 6 * 64 // 4
    ours, asked = run(routing, 64, slots), requests(routing, 64)
    assert ours > lru_hits(asked, slots) + 0.05
    assert ours > static_hits(asked, slots) - 0.05, "the best that anybody can who does not know what comes"
    assert ours > clairvoyant_hits(asked, slots) - 0.15


def test_expected_misses_are_those_that_come() -> None:
    routing = draw_routing(num_layers=4, num_experts=32, top_k=4, num_sweeps=1200, exponent=1.0, seed=2)
    cache = ExpertCache(40, 4 * 32, chosen=16)
    assert cache.expected(1) == pytest.approx((16, 16))
    assert cache.expected(1000) == pytest.approx((128, 128))
    expected = found = 0.0
    for sweep in routing:
        cache.begin_sweep()
        expected += cache.expected(1)[1]
        for layer, chosen in enumerate(sweep):
            wanted = sorted(layer * 32 + int(expert) for expert in chosen)
            missing = cache.want(wanted, [1.0] * 4)
            found += len(missing)
            for expert in missing:
                if not cache.is_there(expert):
                    assert cache.place(expert) is not None
                    cache.let_go(expert)
    assert expected == pytest.approx(found, rel=0.1)


def run(routing: np.ndarray, num_experts: int, num_slots: int) -> float:
    """The share of hits on *routing* ``(sweeps, layers, top_k)``, with one row a sweep."""
    _, num_layers, top_k = routing.shape
    cache = ExpertCache(num_slots, num_layers * num_experts)
    for sweep in routing:
        cache.begin_sweep()
        for layer, chosen in enumerate(sweep):
            wanted = sorted(layer * num_experts + int(expert) for expert in chosen)
            for expert in cache.want(wanted, [1.0] * top_k):
                if not cache.is_there(expert):
                    assert cache.place(expert) is not None
                    cache.let_go(expert)
    return cache.hits / (cache.hits + cache.misses)
