"""Layers on several devices: pure, so no model and no device is needed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.errors import BudgetTooSmall
from layerstream.planner.forecast import Forecast
from layerstream.planner.on_device import make_device_plan
from layerstream.planner.on_devices import make_devices_plan
from layerstream.planner.placement import in_order, in_ranges, in_turns
from layerstream.planner.simulation import simulate

from tests.planner.test_forecast import RATES
from tests.planner.test_planner import MIB, facts

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)
SHARES = st.lists(st.integers(1, 1000), min_size=1, max_size=5)


@given(SIZES, SHARES)
def test_ranges_are_ranges_and_in_proportion(sizes: list[int], shares: list[int]) -> None:
    places = in_ranges(sizes, shares)
    assert list(places) == sorted(places)
    for device, share in enumerate(shares):
        mine = sum(size for size, place in zip(sizes, places, strict=True) if place == device)
        assert abs(mine - sum(sizes) * share / sum(shares)) <= max(sizes)


@given(SIZES, st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_in_turns_every_link_brings_as_much(sizes: list[int], rooms: list[int]) -> None:
    places = in_turns(sizes, rooms)
    streamed = max(0, sum(sizes) - sum(rooms)) / len(rooms)
    for device, room in enumerate(rooms):
        mine = sum(size for size, place in zip(sizes, places, strict=True) if place == device)
        assert mine <= max(1, room + streamed) + len(rooms) * max(sizes)


def test_alike_devices_take_turns_one_by_one() -> None:
    assert in_turns([10] * 7, [20, 20, 20]) == (1, 2, 0, 1, 2, 1, 0)
    assert Counter(in_turns([10] * 12, [60, 0])) == {0: 9, 1: 3}


def test_in_order_fills_one_device_after_the_other() -> None:
    assert in_order(7, 3, lambda device, layers: len(layers) <= 2) == (0, 0, 1, 1, 2, 2, 2)
    assert in_order(3, 3, lambda device, layers: True) == (0, 0, 0)
    assert in_order(3, 2, lambda device, layers: False) == (1, 1, 1)


@given(
    device_map=st.sampled_from(["auto", "balanced", "sequential"]),
    memories=st.lists(st.integers(60, 1500), min_size=1, max_size=4),
    host=st.integers(300, 2500),
    layers=st.integers(1, 12),
)
def test_a_plan_for_several_devices_is_whole_and_within_every_ceiling(
    device_map: str, memories: list[int], host: int, layers: int
) -> None:
    model = dataclasses.replace(facts(layers=layers), is_on_device=True)
    try:
        plan = make_devices_plan(model, device_map, [size * MIB for size in memories], host * MIB)
    except BudgetTooSmall:
        return
    weights = plan.weights
    assert plan.host is not None
    assert plan.host.planned_bytes <= host * MIB
    assert sum(unit.num_bytes for unit in weights.units) == sum(n.total_bytes for n in (*model.body, model.head))
    owners = {unit.name: place for place, part in enumerate(plan.parts) for unit in part.weights.units}
    assert len(owners) == len(weights.units) == sum(len(part.weights.units) for part in plan.parts)
    for number, part in zip(plan.devices, plan.parts, strict=True):
        assert part.planned_bytes <= part.budget_bytes == memories[number] * MIB
        assert (part.num_pages, part.max_sweep_tokens) == (plan.num_pages, plan.max_sweep_tokens)
    resident = {weights.units[index].name for index in weights.residents}
    on_host = {weights.units[index].name for index in weights.host_residents}
    assert resident == {p.weights.units[index].name for p in plan.parts for index in p.weights.residents}
    assert on_host == {p.weights.units[index].name for p in plan.parts for index in p.weights.host_residents}
    assert not resident & on_host
    if plan.disk_bytes:
        assert plan.host.ring_bytes == sum(part.weights.host_ring_bytes for part in plan.parts) > 0
    where = [owners[unit.name] for unit in weights.body]
    layer_of = [int(unit.module.split(".")[1]) if "." in unit.module else layers - 1 for unit in weights.body]
    assert where == [plan.layers[layer] for layer in layer_of]
    assert layer_of == sorted(layer_of), "a sweep passes them in the model's order"
    if device_map != "auto":
        assert list(plan.layers) == sorted(plan.layers)


def test_two_cards_that_take_turns_are_twice_as_fast_where_the_link_is_waited_for() -> None:
    model = dataclasses.replace(facts(layers=24), is_on_device=True)
    rates = dataclasses.replace(RATES, link=1e8)
    memory, host = 300 * MIB, 4096 * MIB
    one = Forecast(make_device_plan(model, memory, host), rates, "bfloat16")
    turns, ranges = (
        Forecast(make_devices_plan(model, device_map, [memory] * 2, host), rates, "bfloat16")
        for device_map in ("auto", "balanced")
    )
    assert turns.plan.takes_turns
    assert not ranges.plan.takes_turns
    assert turns.sweep_seconds < 0.75 * ranges.sweep_seconds, "whose rings are filled while the other one computes"
    assert turns.sweep_seconds < 0.55 * one.sweep_seconds
    for made in (turns, ranges):
        steps = simulate(made, num_sweeps=3)
        computed = [step for step in steps if step.kind == "compute"]
        assert [step.unit for step in computed] == [unit.name for unit in made.plan.weights.units]
        assert all(a.stop <= b.start + 1e-9 for a, b in pairwise(computed))
        assert computed[-1].stop == pytest.approx(made.sweep_seconds, rel=0.2)


def test_what_fits_stays_and_nobody_takes_turns() -> None:
    model = dataclasses.replace(facts(layers=8), is_on_device=True)
    plan = make_devices_plan(model, "auto", [2048 * MIB] * 2, 4096 * MIB)
    assert not plan.streams
    assert not plan.takes_turns
    assert plan.layers == (0,) * 5 + (1,) * 3, "the head is as large as two layers"
    assert "memory of device 1" in str(plan)


def test_devices_without_a_layer_are_left_out() -> None:
    model = dataclasses.replace(facts(layers=2), is_on_device=True)
    plan = make_devices_plan(model, "sequential", [4096 * MIB] * 3, 4096 * MIB)
    assert plan.devices == (0,)
