"""A multi-token-prediction head beside its model: what of the memory it gets."""

from __future__ import annotations

import dataclasses
from bisect import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.errors import BudgetTooSmall
from layerstream.planner import ModelFacts, Plan, make_plan
from layerstream.planner.beside import SHARE_OF_MEMORY, SWEEP_TOKENS, head_stays, plan_with_head

from tests.planner.test_planner import MIB, facts


def with_head(layers: int = 16, hidden: int = 1024) -> ModelFacts:
    return dataclasses.replace(facts(hidden, layers), mtp=facts(hidden, 1))


def plan(model: ModelFacts, budget: int) -> Plan:
    """As an engine on the processor makes it."""

    def spend(model: ModelFacts, head: Plan | None) -> Plan:
        return make_plan(model, budget - (0 if head is None else head.planned_bytes))

    return plan_with_head(model, spend, lambda head: make_plan(head, int(SHARE_OF_MEMORY * budget)))


def test_all_in_memory_with_one_output_projection() -> None:
    found = plan(with_head(), 4096 * MIB)
    assert found.mtp is not None
    assert not found.streams
    assert not found.mtp.streams
    assert not found.mtp.weights.head
    assert found.mtp.facts.embedding_bytes == 0
    assert found.mtp.num_pages * found.mtp.page_tokens <= found.num_pages * found.page_tokens + found.page_tokens
    assert found.mtp.max_sweep_tokens <= SWEEP_TOKENS


def test_an_output_projection_that_streams_is_not_shared() -> None:
    found = [plan(with_head(), mib * MIB) for mib in range(100, 400, 20)]
    beside = [one for one in found if one.mtp is not None]
    assert all(one.streams and (head_stays(one) or one.mtp.weights.head) for one in beside if one.mtp is not None)
    assert {bool(one.mtp.weights.head) for one in beside if one.mtp is not None} == {True, False}


def test_a_model_that_just_fits_stays_in_memory() -> None:
    alone = bisect(range(2000), False, lo=300, key=lambda mib: not make_plan(facts(), mib * MIB).streams)
    found = plan(with_head(), alone * MIB)
    assert found.mtp is None
    assert not found.streams


def test_a_model_is_not_refused_because_of_its_head() -> None:
    with pytest.raises(BudgetTooSmall) as error:
        make_plan(facts(), MIB)
    found = plan(with_head(), error.value.required_bytes)
    assert found.mtp is None
    with pytest.raises(BudgetTooSmall) as other:
        plan(with_head(), MIB)
    assert other.value.required_bytes == error.value.required_bytes


@given(budget=st.integers(20, 900), hidden=st.sampled_from([256, 1024]), layers=st.integers(4, 12))
def test_both_keep_to_the_budget(budget: int, hidden: int, layers: int) -> None:
    model = with_head(layers, hidden)
    try:
        found = plan(model, budget * MIB)
    except BudgetTooSmall:
        return
    taken = 0 if found.mtp is None else found.mtp.planned_bytes
    assert found.planned_bytes + taken <= budget * MIB
    assert taken <= SHARE_OF_MEMORY * budget * MIB
