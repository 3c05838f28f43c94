"""Forecasts: pure arithmetic over rates, so no model and no clock."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.planner import make_plan
from layerstream.planner.advice import advise, quantised
from layerstream.planner.forecast import TOKENS_PER_SWEEP, Forecast
from layerstream.planner.on_device import make_device_plan
from layerstream.planner.rates import Rates
from layerstream.planner.simulation import simulate

from tests.planner.test_planner import MIB, facts

RATES = Rates(
    disk=1e9,
    products={"bfloat16": {1: 1e-10, 64: 3e-10, 128: 6e-10}},
    cached={"bfloat16": {1: 0.5e-10, 128: 4e-10}},
    decode={"nf4": 4e-10, "int8": 2e-10, "int4": 6e-10},
    layer_seconds=1e-4,
    process_bytes=400 * MIB,
)


def forecast(memory: int = 400 * MIB, **rates: float) -> Forecast:
    return Forecast(make_plan(facts(), memory), dataclasses.replace(RATES, **rates), "bfloat16")


def no_kernels(names: set[str]) -> dict[str, int]:
    return {}


def test_rates_survive_json_and_nothing_else_does() -> None:
    assert Rates.from_json(json.loads(json.dumps(RATES.as_json()))) == RATES
    for broken in ({}, {"disk": 1}, {"products": [], "cached": {}}):
        with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
            Rates.from_json(broken)


def test_between_measured_rows_a_straight_line_beyond_them_in_proportion() -> None:
    assert RATES.product_seconds("bfloat16", 1) == 1e-10
    assert RATES.product_seconds("bfloat16", 96) == pytest.approx(4.5e-10)
    assert RATES.product_seconds("bfloat16", 256) == pytest.approx(12e-10)
    assert RATES.product_seconds("float32", 64) == 3e-10, "a dtype that was not measured is taken for one that was"


def test_a_sweep_takes_what_takes_longest() -> None:
    slow_disk, fast_disk = forecast(disk=1e8), forecast(disk=1e12)
    assert slow_disk.bound_by == "disk"
    assert slow_disk.sweep_seconds == slow_disk.plan.disk_bytes / 1e8
    assert fast_disk.bound_by == "compute"
    assert fast_disk.sweep_seconds == pytest.approx(fast_disk.decode_seconds, rel=0.01)
    assert slow_disk.tokens_per_second == TOKENS_PER_SWEEP / slow_disk.sweep_seconds
    assert slow_disk.free_tokens == pytest.approx(10 * forecast().free_tokens, rel=0.02)


def test_stored_context_is_not_computed() -> None:
    made = dataclasses.replace(forecast(disk=1e8), context_tokens=3000)
    assert made.warm_seconds < made.cold_seconds / 2
    assert made.cold_seconds >= math.ceil(3000 / made.plan.max_sweep_tokens) * made.read_seconds


def test_what_crosses_the_link_counts_where_an_accelerator_computes() -> None:
    model = dataclasses.replace(facts(), is_on_device=True)
    plan = make_device_plan(model, 400 * MIB, 2048 * MIB)
    made = Forecast(plan, dataclasses.replace(RATES, link=1e8, device_bytes=300 * MIB), "bfloat16")
    assert plan.disk_bytes == 0 < plan.streamed_bytes
    assert made.bound_by == "link"
    assert made.sweep_seconds == plan.streamed_bytes / 1e8
    assert made.device_bytes == 300 * MIB + plan.planned_bytes


@settings(max_examples=30)
@given(
    memory=st.integers(120, 1200),
    disk=st.floats(1e7, 1e11),
    link=st.none() | st.floats(1e8, 1e11),
    host=st.integers(700, 2500),
)
def test_a_simulated_sweep_is_in_order_and_as_long_as_the_forecast_says(
    memory: int, disk: float, link: float | None, host: int
) -> None:
    model = dataclasses.replace(facts(layers=6), is_on_device=link is not None)
    plan = make_plan(model, memory * MIB) if link is None else make_device_plan(model, memory * MIB, host * MIB)
    made = Forecast(plan, dataclasses.replace(RATES, disk=disk, link=link), "bfloat16")
    steps = simulate(made, num_sweeps=4)
    computed = [step for step in steps if step.kind == "compute"]
    assert [step.unit for step in computed] == [unit.name for unit in plan.weights.units]
    for kind in ("read", "copy", "compute"):
        lane = [step for step in steps if step.kind == kind]
        assert all(a.stop <= b.start + 1e-9 for a, b in pairwise(lane)), f"{kind} overlaps itself"
    length = computed[-1].stop
    compute = sum(made.unit_seconds(unit) for unit in plan.weights.units)
    least = max(made.read_seconds, made.copy_seconds, compute)
    assert length <= 1.01 * (made.read_seconds + made.copy_seconds + compute)
    assert length >= 0.5 * least or not plan.streams


def test_quantised_facts_are_smaller_by_their_bits() -> None:
    packed = quantised(facts(), "nf4", no_kernels)
    assert packed is not None
    assert packed.stored_bytes / facts().stored_bytes == pytest.approx(4.13 / 16, rel=0.01)
    assert quantised(packed, "nf4", no_kernels) == packed or packed.body[0].children[0].children[0].codec == "nf4"


def test_advice_is_what_helps_most_first() -> None:
    advice = advise(facts(), forecast(disk=5e7), no_kernels)
    assert advice[0].speedup == max(item.speedup for item in advice)
    assert any("nf4" in item.change for item in advice)
    assert any("more memory" in item.change for item in advice)
    assert all(item.speedup >= 1.15 for item in advice)


def test_there_is_no_advice_where_nothing_streams_and_nothing_is_slow() -> None:
    made = forecast(4096 * MIB)
    assert not [item for item in advise(facts(), made, no_kernels) if "memory" in item.change]


def test_more_host_memory_is_advised_where_the_disk_is_waited_for() -> None:
    model = dataclasses.replace(facts(layers=40), is_on_device=True)
    plan = make_device_plan(model, 400 * MIB, 700 * MIB)
    made = Forecast(plan, dataclasses.replace(RATES, disk=1e8, link=2e10), "bfloat16")
    assert plan.disk_bytes > 0
    assert any("more host memory" in item.change for item in advise(model, made, no_kernels))
