"""The ceiling: what grows with requests has a place in the plan, and what the engine took is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream import LayerStream, SamplingParams
from layerstream.api.events import Event, SweepStarted
from layerstream.errors import BudgetTooSmall
from layerstream.hardware.arena import Arena
from layerstream.hardware.footprint import Footprint
from layerstream.model.head import _LogitRoom
from layerstream.planner import make_plan, on_device, on_host
from layerstream.planner.on_device import make_device_plan
from torch import bfloat16, float32

from tests.harness import budget_for, draw_prompt, shrink_units
from tests.planner.test_planner import MIB, facts

GIB = 2**30
MOST_AT_ONCE = 4


@settings(max_examples=25)
@given(budget=st.integers(40, 4000), vocab=st.sampled_from([1024, 32_000, 128_256, 262_144]))
def test_the_logits_of_all_that_run_have_room(budget: int, vocab: int) -> None:
    try:
        plan = make_plan(facts(vocab=vocab), budget * MIB)
    except BudgetTooSmall:
        return
    row = vocab * plan.facts.itemsize
    assert plan.logit_bytes == (plan.max_sequences + plan.max_draft_rows) * row
    assert on_host.LEAST_SEQUENCES <= plan.max_sequences <= on_host.MAX_SEQUENCES
    row_block, sampling = plan.head_rows * row, on_host.SAMPLING_BYTES * vocab
    assert plan.logit_bytes + row_block + sampling < plan.activation_bytes
    assert plan.planned_bytes <= plan.budget_bytes


def test_more_memory_lets_more_run_at_once() -> None:
    few, many = (make_plan(facts(vocab=128_256), size * MIB) for size in (300, 3000))
    assert few.max_sequences < many.max_sequences
    assert few.max_sequences + few.max_draft_rows < many.max_sequences + many.max_draft_rows


def test_logits_that_come_to_the_host_have_room_there() -> None:
    model = dataclasses.replace(facts(vocab=262_144), is_on_device=True)
    plan = make_device_plan(model, 8 * GIB, 8 * GIB)
    assert plan.host is not None
    assert plan.logit_bytes > on_device.HOST_LOGIT_BYTES
    rest = on_device.HOST_WORKSPACE_BYTES - on_device.HOST_LOGIT_BYTES
    staged = plan.staged_rows * model.kv_token_bytes
    assert plan.host.workspace_bytes == rest + plan.logit_bytes + staged
    assert plan.host.planned_bytes <= plan.host.budget_bytes


@pytest.fixture
def crowded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """How to open an engine that has room for the logits of a few."""
    shrink_units(monkeypatch)
    monkeypatch.setattr(on_host, "LEAST_SEQUENCES", MOST_AT_ONCE)
    monkeypatch.setattr(on_host, "MAX_SEQUENCES", MOST_AT_ONCE)
    return {"model": folder, "memory": budget_for(folder, "streaming"), "dtype": "float32", "kv_store": None}


def test_no_sweep_samples_more_rows_than_were_planned(crowded: dict[str, object]) -> None:
    counts: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, SweepStarted):
            counts.append(event.num_sequences)

    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = [draw_prompt(5 + index, seed=index) for index in range(11)]
    with LayerStream(**crowded, progress=listen) as engine:  # pyright: ignore[reportArgumentType]
        assert engine.plan.max_sequences == MOST_AT_ONCE
        together = engine.generate(prompts, params)
        assert max(counts) == MOST_AT_ONCE
        alone = [engine.generate([prompt], params)[0] for prompt in prompts[-3:]]
    assert [c.token_ids for c in together[-3:]] == [c.token_ids for c in alone]


def test_beams_and_others_share_the_rows(crowded: dict[str, object]) -> None:
    counts: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, SweepStarted):
            counts.append(event.num_sequences)

    with LayerStream(**crowded, progress=listen) as engine:  # pyright: ignore[reportArgumentType]
        requests = [
            engine.submit(draw_prompt(6, seed=index), SamplingParams(max_tokens=5, beam_width=width, ignore_eos=True))
            for index, width in enumerate((3, 2, None, 4))
        ]
        found = [request.result(60) for request in requests]
    assert [len(completion.token_ids) for completion in found] == [5, 5, 5, 5]
    assert max(counts) <= MOST_AT_ONCE


def test_logits_lie_in_the_same_memory_sweep_after_sweep() -> None:
    room = _LogitRoom()
    first = room.take(8, 100, float32)
    assert room.take(3, 100, float32).data_ptr() == first.data_ptr()
    assert room.take(16, 100, bfloat16).data_ptr() == first.data_ptr()
    grown = room.take(40, 100, float32)
    grown.fill_(1.0)
    assert room.take(40, 100, float32).data_ptr() == grown.data_ptr()


def test_the_peak_is_what_was_held_at_most() -> None:
    footprint = Footprint()
    footprint.look()
    before = footprint.peak_bytes
    arena = Arena(64 * MIB)
    arena.tensor.fill_(1)
    footprint._next_look = 0.0
    footprint.look()
    assert footprint.peak_bytes - before > 60 * MIB
    del arena
    footprint._next_look = 0.0
    footprint.look()
    assert footprint.peak_bytes - before > 60 * MIB, "a peak does not go away"


def test_the_statistics_have_both_what_was_measured_and_what_was_planned(engine: LayerStream) -> None:
    engine.generate([draw_prompt(20)], SamplingParams(max_tokens=3, ignore_eos=True))
    stats = engine.stats()
    assert stats.peak_memory_bytes > 0
    assert engine.plan.resident_bytes < stats.planned_memory_bytes <= stats.budget_bytes
