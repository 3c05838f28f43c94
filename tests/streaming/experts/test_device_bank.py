"""Experts behind a device whose lanes are all late: whatever is not ordered by marks comes out as wrong bytes."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layerstream.errors import EngineClosed
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.experts.bank import ExpertBank, ExpertLost, Wish
from layerstream.streaming.experts.cache import ExpertCache
from layerstream.streaming.experts.device_bank import DeviceBank
from layerstream.streaming.experts.paths import ExpertPaths

from tests.pretend import PretendDevice
from tests.streaming.units import hold_reads, write_units

COUNT = 18
PER_LAYER = 6
NUM_LAYERS = COUNT // PER_LAYER


class Experts:
    """Layers of experts that cross to a device; what the device computes with is looked at when it comes to it."""

    def __init__(self, folder: Path, slots: tuple[int, int], seed: int = 0, *, computes_on_host: bool = True) -> None:
        self.tensors, self.layouts = write_units(folder, COUNT, seed)
        self.file = folder / "model.safetensors"
        self.reader = DirectReader(num_threads=2)
        self.device = PretendDevice(late_compute=True, seed=seed, pause=0.001)
        slot_bytes = max(layout.num_bytes for layout in self.layouts)
        layout = self.layouts.__getitem__
        self.host = ExpertBank(layout, ExpertCache(slots[1], COUNT), slot_bytes, self.reader)
        self.paths = ExpertPaths(slot_bytes)
        self.bank = DeviceBank(
            layout,
            ExpertCache(slots[0], COUNT),
            slot_bytes,
            self.host,
            self.device,
            self.paths,
            computes_on_host=computes_on_host,
        )
        self.wrong: list[str] = []
        self.on_host: list[int] = []
        self.num_wanted = 0

    def pass_layer(self, wanted: list[int], rows: list[int], may_skip=lambda: True, stop_at: int | None = None):
        """The order in which *wanted* came; *stop_at*: the sweep is left when so many have."""
        wish = Wish(wanted, rows, float(sum(rows)))
        on_host = self.bank.divide(wish)
        order: list[int] = []
        self.num_wanted += len(wanted)
        for expert, tensors, is_on_host in self.bank.bring(wish, on_host, may_skip):
            assert is_on_host == (expert in on_host)
            if is_on_host:
                self.on_host.append(expert)
                self._check(tensors)
            else:
                self.device.compute.run(lambda tensors=tensors: self._check(tensors))
            self.bank.check_integrity()
            order.append(expert)
            if len(order) == stop_at:
                break
        return order

    def sweep(self, draw: random.Random, may_skip=lambda: True, stop_at: int | None = None) -> None:
        self.bank.begin(with_tail=True)
        for layer in range(NUM_LAYERS):
            members = range(layer * PER_LAYER, (layer + 1) * PER_LAYER)
            wanted = sorted(draw.sample(members, draw.randint(1, PER_LAYER)))
            order = self.pass_layer(wanted, [draw.randint(1, 9) for _ in wanted], may_skip, stop_at)
            if len(order) == stop_at:
                self.bank.abort()
                self.bank.check_integrity()
                return
            assert sorted(order) == wanted
        self.bank.end()
        assert not self.host._held, "a host slot is held for nobody"
        assert not self.bank._here

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.equal(tensor, self.tensors[name]):
                self.wrong.append(name)

    def close(self) -> None:
        self.bank.close()
        device, host = self.bank.cache, self.host.cache
        assert device.hits + device.misses == self.num_wanted
        assert host.hits + host.misses == device.misses
        self.device.compute.mark().wait()
        assert not self.device.pinned
        self.reader.close()
        self.device.close()
        assert self.wrong == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(slots=(1, 1), on_host=True, skips=False, stop=None, seed=0)
@example(slots=(COUNT, 1), on_host=True, skips=True, stop=None, seed=0)
@given(
    slots=st.tuples(st.integers(1, COUNT), st.integers(1, COUNT)),
    on_host=st.booleans(),
    skips=st.booleans(),
    stop=st.none() | st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_what_is_computed_with_is_what_is_stored(
    tmp_path_factory: pytest.TempPathFactory,
    slots: tuple[int, int],
    on_host: bool,
    skips: bool,
    stop: int | None,
    seed: int,
) -> None:
    experts = Experts(tmp_path_factory.mktemp("experts"), slots, seed, computes_on_host=on_host)
    draw = random.Random(seed)
    experts.bank.load_hottest(lambda num_bytes: None)
    if stop is not None:
        experts.sweep(draw, stop_at=stop)
    for _ in range(3):
        experts.sweep(draw, (lambda: draw.random() < 0.7) if skips else (lambda: False))
    experts.close()


def test_compute_that_does_not_wait_for_its_copy_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts(tmp_path, (2, 4), computes_on_host=False)
    monkeypatch.setattr(experts.device.compute, "after", lambda mark: None)
    for _ in range(3):
        experts.sweep(random.Random(3))
    with pytest.raises(AssertionError, match="unit"):
        experts.close()


def test_a_copy_that_does_not_wait_for_the_compute_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = Experts(tmp_path, (2, 4), computes_on_host=False)
    monkeypatch.setattr(experts.device.inward, "after", lambda mark: None)
    for _ in range(3):
        experts.device.compute.run(lambda: time.sleep(0.1))
        experts.sweep(random.Random(3))
    with pytest.raises(AssertionError, match="unit"):
        experts.close()


def test_the_hottest_are_on_the_device_and_the_next_behind_it(tmp_path: Path) -> None:
    experts = Experts(tmp_path, (4, 5))
    shares = [float(COUNT - expert) for expert in range(COUNT)]
    experts.bank.cache.restore(shares)
    experts.host.cache.restore(shares)
    read: list[int] = []
    experts.bank.load_hottest(read.append)
    assert sum(read) >= sum(layout.weight_bytes for layout in experts.layouts[:9])
    assert all(experts.bank.cache.is_there(expert) for expert in range(4))
    assert all(experts.host.cache.is_there(expert) for expert in range(4, 9))
    experts.bank.begin(with_tail=True)
    experts.pass_layer([0, 1, 2, 3], [1] * 4)
    assert (experts.bank.cache.hits, experts.bank.streamed_bytes) == (4, 0)
    experts.pass_layer([5, 6, 7], [1] * 3)
    experts.bank.end()
    assert (experts.host.cache.hits, experts.host.streamed_bytes) == (3, 0)
    assert experts.bank.expected(1)[2] < experts.bank.expected(1)[1]
    experts.close()


def test_the_processor_gets_those_with_few_rows(tmp_path: Path) -> None:
    experts = Experts(tmp_path, (2, COUNT))
    experts.bank.load_hottest(lambda num_bytes: None)
    for _ in range(50):
        experts.paths.shipped(0.01)
        experts.paths.computed(1, 0.005)
        experts.paths.computed(100, 0.5)
    wanted = [expert for expert in range(6) if not experts.bank.cache.is_there(expert)][:4]
    experts.bank.begin(with_tail=True)
    experts.pass_layer(wanted, [300, 1, 300, 1])
    experts.bank.end()
    assert sorted(experts.on_host) == [wanted[1], wanted[3]]
    assert experts.bank.num_computed_on_host == 2
    experts.close()


def test_an_expert_that_cannot_be_read_is_named_and_harms_no_other(tmp_path: Path) -> None:
    experts = Experts(tmp_path, (3, 3), computes_on_host=False)
    whole = experts.file.read_bytes()
    experts.file.write_bytes(whole[:200])
    experts.bank.begin(with_tail=True)
    with pytest.raises(ExpertLost):
        experts.pass_layer([0, 1, 2, 3], [1] * 4)
    experts.bank.abort()
    experts.bank.check_integrity()
    experts.file.write_bytes(whole)
    experts.reader.forget(experts.file)
    for _ in range(3):
        experts.sweep(random.Random(5))
    experts.close()


def test_an_interrupt_reaches_who_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts(tmp_path, (3, 3))
    gate = hold_reads(monkeypatch)
    experts.bank.begin(with_tail=True)
    threading.Timer(0.05, experts.bank.interrupt, [EngineClosed("closing")]).start()
    with pytest.raises(EngineClosed):
        experts.pass_layer([1, 2, 3], [1] * 3)
    gate.set()
    experts.bank.abort()
    experts.sweep(random.Random(1))
    experts.close()
