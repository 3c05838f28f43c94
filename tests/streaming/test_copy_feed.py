"""Both rings, with a device whose lanes are all late: whatever is not ordered by marks comes out as wrong bytes."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layerstream.errors import EngineClosed, TruncatedFile
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.copy_feed import CopyFeed
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.streamer import Streamer

from tests.pretend import PretendDevice
from tests.streaming.units import write_units


class Pipeline:
    """Units streamed to a device; ``compute`` checks their bytes later, when the compute lane comes to it."""

    def __init__(self, folder: Path, residents: set[int], rings: tuple[float, float], seed: int, num_units: int = 7):
        self.tensors, self.layouts = write_units(folder, num_units, seed)
        self.reader = DirectReader(num_threads=2)
        self.device = PretendDevice(late_compute=True, seed=seed, pause=0.001)
        largest = max(layout.num_bytes for layout in self.layouts)
        self.source = HostSource(self.device, self.layouts, residents, int(rings[0] * largest), self.reader)
        self.feed = CopyFeed(self.layouts, int(rings[1] * largest), self.device, self.source)
        self.streamer = Streamer(self.feed, num_cycle=num_units - 1)
        self.wrong: list[str] = []
        self._random = random.Random(seed)

    def sweep(self, *, with_tail: bool, stop_at: int | None = None) -> None:
        self.streamer.begin(with_tail=with_tail)
        for index in range(len(self.layouts) - (not with_tail)):
            if index == stop_at:
                return
            views = self.streamer.acquire(index)
            self.device.compute.run(lambda index=index, views=views: self._check(index, views))
            self.streamer.release(index)
        self.streamer.end()

    def _check(self, index: int, views: dict[str, torch.Tensor]) -> None:
        for name, tensor in views.items():
            if not torch.equal(tensor, self.tensors[name]):
                self.wrong.append(f"unit {index}: {name}")

    def finish(self) -> None:
        self.streamer.abort()
        self.streamer.check_integrity()
        assert self.source._ring is None or not self.source._ring.present, "the copier still holds places there"
        self.device.compute.mark().wait()
        assert self.wrong == []
        self.close()

    def close(self) -> None:
        self.feed.close()
        assert not self.device.pinned
        self.reader.close()
        self.device.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(residents={0, 1}, rings=(3.0, 3.0), tails=[True, False, False], stop=None, seed=0)  # all of it fits
@given(
    residents=st.sets(st.integers(0, 6)),
    rings=st.tuples(st.floats(1, 3), st.floats(1, 3)),
    tails=st.lists(st.booleans(), min_size=1, max_size=4),
    stop=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 5)),
    seed=st.integers(0, 1000),
)
def test_every_unit_is_whole_when_the_compute_comes_to_it(
    tmp_path_factory: pytest.TempPathFactory,
    residents: set[int],
    rings: tuple[float, float],
    tails: list[bool],
    stop: tuple[int, int] | None,
    seed: int,
) -> None:
    pipeline = Pipeline(tmp_path_factory.mktemp("units"), residents, rings, seed)
    pipeline.streamer.read_ahead()
    for number, with_tail in enumerate(tails):
        if stop is not None and stop[0] == number:
            pipeline.sweep(with_tail=with_tail, stop_at=stop[1])
            pipeline.streamer.abort()
        pipeline.sweep(with_tail=with_tail)
    pipeline.finish()


def test_compute_that_does_not_wait_for_its_copy_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tmp_path, {0, 1, 2, 3, 4, 5, 6}, (1, 1), 3)
    monkeypatch.setattr(pipeline.device.compute, "after", lambda mark: None)
    for _ in range(3):
        pipeline.sweep(with_tail=True)
    with pytest.raises(AssertionError, match="unit"):
        pipeline.finish()
    pipeline.close()


def test_a_copy_that_does_not_wait_for_the_compute_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(tmp_path, {0, 1, 2, 3, 4, 5, 6}, (1, 1), 3)
    monkeypatch.setattr(pipeline.device.inward, "after", lambda mark: None)
    pipeline.device.compute.run(lambda: time.sleep(0.1))
    for _ in range(3):
        pipeline.sweep(with_tail=True)
    with pytest.raises(AssertionError, match="unit"):
        pipeline.finish()
    pipeline.close()


def test_a_read_error_reaches_the_compute_and_the_next_sweep_is_whole(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, {1}, (2, 2), 5)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(whole) // 3)
    with pytest.raises(TruncatedFile, match="fetch it again"):
        pipeline.sweep(with_tail=True)
    pipeline.streamer.abort()
    with path.open("r+b") as file:
        file.write(whole)
    pipeline.sweep(with_tail=True)
    pipeline.finish()


def test_an_interrupt_wakes_the_compute_while_the_copier_waits_for_the_disk(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, set(), (1, 1), 6)
    assert pipeline.source._ring is not None
    pipeline.source._ring._reader = dead = _DeadReader()  # type: ignore[assignment]
    pipeline.streamer.begin(with_tail=False)
    timer = threading.Timer(0.1, pipeline.streamer.interrupt, [EngineClosed("over")])
    timer.start()
    with pytest.raises(EngineClosed):
        pipeline.streamer.acquire(0)
    dead.answer()
    pipeline.streamer.abort()
    pipeline.close()


class _DeadReader:
    """Takes requests and does not answer before it is told to."""

    def __init__(self) -> None:
        self._waiting: list = []

    def submit(self, request, memory, base, done, **_) -> None:
        self._waiting.append(done)

    def answer(self) -> None:
        for done in self._waiting:
            done(None)
