"""Experts from real files: the right bytes whatever the order and however few slots, and faults that pass."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layerstream.errors import EngineClosed, ReadError, TruncatedFile
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.experts.bank import ExpertBank, ExpertLost
from layerstream.streaming.experts.cache import ExpertCache
from layerstream.streaming.layout import UnitLayout

from tests.streaming.units import hold_reads, write_units

COUNT = 24
PER_LAYER = 8


@pytest.fixture
def reader() -> Iterator[DirectReader]:
    reader = DirectReader(num_threads=3)
    yield reader
    reader.close()


@pytest.fixture
def experts(tmp_path: Path) -> tuple[dict[str, torch.Tensor], list[UnitLayout]]:
    return write_units(tmp_path, COUNT)


def make_bank(layouts: list[UnitLayout], num_slots: int, reader: DirectReader) -> ExpertBank:
    cache = ExpertCache(num_slots, COUNT)
    return ExpertBank(layouts.__getitem__, cache, max(layout.num_bytes for layout in layouts), reader)


def pass_layer(bank: ExpertBank, layouts: list[UnitLayout], wanted: list[int], tensors, may_skip: bool) -> list[int]:
    """Take *wanted*, compare their bytes; the order in which they came."""
    bank.want(wanted, [1 / len(wanted)] * len(wanted))
    waiting, order = list(wanted), []
    while waiting:
        expert = bank.next(waiting, may_skip=may_skip)
        for name, tensor in bank.tensors(expert).items():
            assert torch.equal(tensor, tensors[name])
        bank.check_integrity()
        bank.release(expert)
        bank.check_integrity()
        waiting.remove(expert)
        order.append(expert)
    return order


@pytest.mark.parametrize("may_skip", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 10, COUNT])
def test_what_is_taken_is_what_is_stored(num_slots: int, may_skip: bool, experts, reader: DirectReader) -> None:
    tensors, layouts = experts
    bank = make_bank(layouts, num_slots, reader)
    draw = random.Random(num_slots)
    for _ in range(20):
        bank.begin(with_tail=False)
        for layer in range(COUNT // PER_LAYER):
            members = range(layer * PER_LAYER, (layer + 1) * PER_LAYER)
            wanted = sorted(draw.sample(members, draw.randint(1, PER_LAYER)))
            order = pass_layer(bank, layouts, wanted, tensors, may_skip)
            assert sorted(order) == wanted
            if not may_skip:
                assert order == wanted
        bank.end()
    cache = bank.cache
    if num_slots == COUNT:
        assert cache.misses == COUNT, "an expert that stays was read twice"
    assert bank.streamed_bytes <= cache.misses * max(layout.weight_bytes for layout in layouts)


def test_hot_experts_are_there_before_the_first_sweep(experts, reader: DirectReader) -> None:
    tensors, layouts = experts
    bank = make_bank(layouts, 6, reader)
    read: list[int] = []
    bank.cache.restore([float(expert % 4 == 0) for expert in range(COUNT)])
    bank.load_hottest(read.append)
    assert sum(read) >= sum(layouts[expert].weight_bytes for expert in range(0, COUNT, 4))
    bank.begin(with_tail=False)
    pass_layer(bank, layouts, [0, 4, 8, 12, 16, 20], tensors, may_skip=False)
    assert (bank.cache.hits, bank.cache.misses, bank.streamed_bytes) == (6, 0, 0)


def test_an_expert_that_cannot_be_read_harms_no_other(experts, reader: DirectReader, tmp_path: Path) -> None:
    tensors, layouts = experts
    bank = make_bank(layouts, 5, reader)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    bad = max(range(COUNT), key=lambda expert: max(r.offset for r in layouts[expert].requests))
    good = [expert for expert in range(COUNT) if expert != bad][:4]
    os.truncate(path, layouts[bad].requests[0].offset)
    wanted = sorted([*good, bad])
    bank.begin(with_tail=False)
    bank.want(wanted, [1.0] * 5)
    for expert in wanted:
        if expert == bad:
            with pytest.raises(ExpertLost) as lost:
                bank.take(expert)
            assert lost.value.expert == bad
            assert isinstance(lost.value.error, TruncatedFile | ReadError)
            continue
        bank.take(expert)
        bank.release(expert)
    bank.check_integrity()
    path.write_bytes(whole)
    reader.forget(path)
    bank.begin(with_tail=False)
    pass_layer(bank, layouts, wanted, tensors, may_skip=False)  # and it is read again


def test_an_interrupt_reaches_who_waits(experts, reader: DirectReader, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, layouts = experts
    bank = make_bank(layouts, 3, reader)
    gate = hold_reads(monkeypatch)
    bank.begin(with_tail=False)
    bank.want([1, 2, 3], [1.0] * 3)
    timer = threading.Timer(0.05, bank.interrupt, [EngineClosed("closing")])
    timer.start()
    with pytest.raises(EngineClosed):
        bank.take(1)
    gate.set()
    bank.abort()
    bank.check_integrity()
    pass_layer(bank, layouts, [1, 2, 3, 4], tensors, may_skip=True)


def test_a_sweep_that_is_abandoned_leaves_whole_experts(experts, reader: DirectReader) -> None:
    tensors, layouts = experts
    bank = make_bank(layouts, 4, reader)
    for step in range(8):
        bank.begin(with_tail=False)
        bank.want(list(range(8)), [1.0] * 8)
        for expert in range(step):
            bank.take(expert)
            if expert < step - 1:
                bank.release(expert)
        bank.abort()
        bank.check_integrity()
    pass_layer(bank, layouts, list(range(COUNT)), tensors, may_skip=False)
