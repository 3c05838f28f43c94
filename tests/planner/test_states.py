"""Room for the states of recurrent layers: at least two slots, the rest by shares; nothing is divided by no KV."""

from __future__ import annotations

import dataclasses
from bisect import bisect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.errors import BudgetTooSmall
from layerstream.planner import ModelFacts, comfortable_bytes, make_plan
from layerstream.planner.on_device import make_device_plan
from layerstream.planner.on_devices import make_devices_plan
from layerstream.planner.states import MOST_SEQUENCES, MOST_SLOTS, STATES_SHARE

from tests.planner.test_planner import MIB, facts

LAYERS = 8


def hybrid(state_bytes: int = 2 * MIB, *, keeps_kv: bool = True) -> ModelFacts:
    """Three layers of four keep a state of *state_bytes*; the others keep KV, or nothing does."""
    recurrent = [not keeps_kv or layer % 4 != 3 for layer in range(LAYERS)]
    model = facts(layers=LAYERS)
    return dataclasses.replace(
        model,
        streaming_chunk_tokens=64,
        layer_kv=tuple(0 if is_recurrent else model.hidden_size for is_recurrent in recurrent),
        layer_state=tuple(state_bytes if is_recurrent else 0 for is_recurrent in recurrent),
        layer_state_row=tuple(8192 if is_recurrent else 0 for is_recurrent in recurrent),
    )


@given(budget=st.integers(20, 1500), state=st.integers(1, 40 * MIB), keeps_kv=st.booleans())
def test_two_slots_at_the_least_and_no_more_than_the_budget_holds(budget: int, state: int, keeps_kv: bool) -> None:
    model = hybrid(state, keeps_kv=keeps_kv)
    try:
        plan = make_plan(model, budget * MIB)
    except BudgetTooSmall as error:
        assert error.required_bytes > budget * MIB  # noqa: PT017  # the other branch is the test
        return
    assert plan.planned_bytes <= plan.budget_bytes
    assert 2 <= plan.num_slots <= MOST_SLOTS
    assert 1 <= plan.max_sequences <= plan.num_slots // 2
    assert plan.num_slots == 2 or plan.max_sequences * 2 < plan.num_slots, "snapshots have a slot"
    assert plan.state_bytes == plan.num_slots * model.state_bytes
    if plan.streams and plan.num_slots > 3:
        assert plan.state_bytes <= STATES_SHARE * plan.budget_bytes
    if plan.embedding_resident and plan.num_slots < MOST_SLOTS:
        left = plan.budget_bytes - plan.resident_bytes - plan.activation_bytes
        assert (plan.num_slots + 1) * model.state_bytes > STATES_SHARE * left


@pytest.mark.parametrize("keeps_kv", [True, False])
def test_the_minimum_that_the_error_names_holds_two_states(keeps_kv: bool) -> None:
    model = hybrid(16 * MIB, keeps_kv=keeps_kv)
    with pytest.raises(BudgetTooSmall, match="a sequence needs two states of ") as caught:
        make_plan(model, 1)
    least = caught.value.required_bytes
    plan = make_plan(model, least)
    assert (plan.num_slots, plan.max_sequences) == (2, 1)
    assert plan.planned_bytes <= least
    with pytest.raises(BudgetTooSmall):
        make_plan(model, least - 1)
    stateless = dataclasses.replace(model, layer_state=())
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(stateless, 1)
    assert least >= caught.value.required_bytes + 2 * model.state_bytes


def test_more_memory_takes_more_slots_up_to_what_the_sequences_use() -> None:
    model = hybrid()
    slots = [make_plan(model, size * MIB).num_slots for size in (150, 300, 900, 6000)]
    assert slots == sorted(slots)
    assert slots[-1] == MOST_SLOTS
    comfortable = make_plan(model, comfortable_bytes(model))
    assert comfortable.num_slots >= 2 * MOST_SEQUENCES
    assert comfortable.max_draft_rows
    assert not comfortable.streams


def test_what_fits_with_two_states_is_resident() -> None:
    model = hybrid(8 * MIB)
    fits = bisect(range(2000), False, lo=200, key=lambda size: not make_plan(model, size * MIB).streams)
    tight = make_plan(model, fits * MIB)
    assert tight.num_slots >= 2
    assert tight.kv_bytes > 0


def test_a_model_without_kv_has_pages_as_accounts_alone() -> None:
    for budget in (200, 4096):
        plan = make_plan(hybrid(keeps_kv=False), budget * MIB)
        assert plan.kv_bytes == plan.transit_bytes == 0
        assert plan.num_pages * plan.page_tokens >= 16 * plan.facts.context_length
    spilling = dataclasses.replace(hybrid(keeps_kv=False), can_spill=True)
    assert make_plan(spilling, 200 * MIB).num_transit == 0


def test_the_plan_says_what_states_take() -> None:
    plan = make_plan(hybrid(), 400 * MIB)
    row = next(line for line in str(plan).splitlines() if line.startswith("states "))
    assert f"{plan.num_slots} slots of 12.0 MiB" in row
    assert len(row) <= 80
    assert "states" not in str(make_plan(facts(), 400 * MIB))


@pytest.mark.parametrize("keeps_kv", [True, False])
def test_on_an_accelerator_slots_are_in_its_memory(keeps_kv: bool) -> None:
    model = dataclasses.replace(hybrid(keeps_kv=keeps_kv), is_on_device=True, streaming_chunk_tokens=128)
    plan = make_device_plan(model, 300 * MIB, 4096 * MIB)
    assert plan.planned_bytes <= plan.budget_bytes
    assert plan.num_slots > 2
    assert plan.host is not None
    assert plan.host.kv_bytes == plan.num_pages * plan.page_tokens * model.kv_token_bytes


def test_every_device_keeps_the_states_of_its_own_layers() -> None:
    model = dataclasses.replace(hybrid(16 * MIB), is_on_device=True, streaming_chunk_tokens=128)
    plan = make_devices_plan(model, "balanced", [400 * MIB, 300 * MIB, 1500 * MIB], 4096 * MIB)
    assert len({part.num_slots for part in plan.parts}) == 1
    assert sum(part.facts.state_bytes for part in plan.parts) == model.state_bytes
    assert plan.state_bytes == sum(part.state_bytes for part in plan.parts)
    assert all(part.planned_bytes <= part.budget_bytes for part in plan.parts)
    assert plan.max_sequences <= plan.num_slots // 2


def test_devices_whose_layers_keep_no_state_do_not_bound_the_slots() -> None:
    states = (MIB,) + (0,) * (LAYERS - 1)
    model = dataclasses.replace(facts(layers=LAYERS), layer_state=states, is_on_device=True, streaming_chunk_tokens=128)
    plan = make_devices_plan(model, "balanced", [400 * MIB, 400 * MIB], 4096 * MIB)
    assert [part.facts.state_bytes for part in plan.parts] == [MIB, 0]
    assert plan.num_slots == MOST_SLOTS
