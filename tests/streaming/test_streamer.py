"""Reader and streamer on real files: order, faults, and what is left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layerstream.checkpoint.header import read_header
from layerstream.checkpoint.names import ParameterSource
from layerstream.checkpoint.pieces import PiecedTensor, concatenate, stack
from layerstream.core.sizes import PAGE
from layerstream.errors import EngineClosed, ReadError, TruncatedFile
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.copy_feed import CopyFeed
from layerstream.streaming.feed import ReadFeed
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.layout import Part, UnitLayout, lay_out
from layerstream.streaming.loader import load_unit
from layerstream.streaming.streamer import ScheduleMismatch, Streamer
from safetensors.torch import save_file

from tests.pretend import PretendDevice
from tests.streaming.units import lay_out_units

Pipe = Callable[..., Streamer]
RESIDENT = 2


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def reader(request: pytest.FixtureRequest):
    reader = DirectReader(num_threads=3, direct=request.param)
    yield reader
    reader.close()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"unit{i}.w": torch.randn(37 + 100 * i, 61, generator=generator) for i in range(5)}


@pytest.fixture(params=["to the host", "to a device"])
def pipe(request: pytest.FixtureRequest):
    """Makes streamers: from disk to the host, or on to a device, with one unit that stays on the host."""
    opened: list[CopyFeed | PretendDevice] = []

    def make(units: list[UnitLayout], reader: DirectReader, num_cycle: int = 5) -> Streamer:
        ring_bytes = 2 * max(unit.num_bytes for unit in units)
        if request.param == "to the host":
            return Streamer(ReadFeed(units, ring_bytes, reader), num_cycle)
        device = PretendDevice(late_compute=False)
        feed = CopyFeed(units, ring_bytes, device, HostSource(device, units, {RESIDENT}, ring_bytes, reader))
        opened.extend([feed, device])
        return Streamer(feed, num_cycle)

    yield make
    for thing in opened:
        thing.close()


def _pass(streamer: Streamer) -> None:
    for index in range(5):
        streamer.acquire(index)
        streamer.release(index)


def test_units_arrive_in_place_sweep_after_sweep(
    pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor], reader: DirectReader
) -> None:
    units = lay_out_units(tmp_path, tensors)
    streamer = pipe(units, reader, num_cycle=4)
    for with_tail in (True, False, True):
        streamer.begin(with_tail=with_tail)
        for index in range(5 if with_tail else 4):
            views = streamer.acquire(index)
            assert torch.equal(views[f"unit{index}.w"], tensors[f"unit{index}.w"])
            streamer.check_integrity()
            streamer.release(index)
        streamer.end()
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert streamer.streamed_bytes == 3 * whole - tensors["unit4.w"].nbytes
    streamer.abort()
    streamer.check_integrity()


def test_the_first_sweep_begins_before_it_is_asked_for(
    pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor], reader: DirectReader
) -> None:
    units = lay_out_units(tmp_path, tensors)
    streamer = pipe(units, reader)
    streamer.read_ahead()
    assert streamer.feed.present[:2] == [0, 1]
    for _ in range(2):
        streamer.begin(with_tail=False)
        streamer.check_integrity()
        for index in range(5):
            views = streamer.acquire(index)
            assert torch.equal(views[f"unit{index}.w"], tensors[f"unit{index}.w"])
            streamer.release(index)
        streamer.end()
        streamer.read_ahead()  # too late: nothing happens
    streamer.abort()
    streamer.check_integrity()


def test_the_next_sweep_begins_before_it_is_asked_for(
    pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    units = lay_out_units(tmp_path, tensors)
    reader = DirectReader()
    streamer = pipe(units, reader)
    streamer.begin(with_tail=False)
    for index in range(5):
        streamer.acquire(index)
        streamer.release(index)
    streamer.end()
    assert streamer.feed.present[0] == 0
    streamer.abort()
    reader.close()


def test_another_order_is_learned_once_and_then_kept(
    pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor], reader: DirectReader
) -> None:
    units = lay_out_units(tmp_path, tensors)
    streamer = pipe(units, reader)
    order = [1, 0, 2, 4, 3]
    for _ in range(3):
        streamer.begin(with_tail=False)
        for index in order:
            assert torch.equal(streamer.acquire(index)[f"unit{index}.w"], tensors[f"unit{index}.w"])
            streamer.release(index)
        streamer.end()
    streamer.begin(with_tail=False)
    with pytest.raises(ScheduleMismatch, match=r"asked for unit3.w; the schedule says unit1.w"):
        streamer.acquire(3)
    streamer.abort()


def test_a_file_cut_short_fails_the_sweep_and_not_the_next(
    pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    units = lay_out_units(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    reader = DirectReader()
    streamer = pipe(units, reader)
    os.truncate(path, len(whole) // 3)
    streamer.begin(with_tail=False)
    with pytest.raises(TruncatedFile, match="fetch it again"):
        _pass(streamer)
    streamer.abort()
    streamer.check_integrity()
    with path.open("r+b") as file:
        file.write(whole)
    streamer.begin(with_tail=False)
    for index in range(5):
        assert torch.equal(streamer.acquire(index)[f"unit{index}.w"], tensors[f"unit{index}.w"])
        streamer.release(index)
    streamer.end()
    streamer.abort()
    reader.close()


def test_an_interrupt_ends_the_wait(pipe: Pipe, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    units = lay_out_units(tmp_path, tensors)
    reader = DirectReader()
    streamer = pipe(units, reader)
    streamer.begin(with_tail=False)
    streamer.interrupt(EngineClosed("over"))
    with pytest.raises(EngineClosed):
        streamer.acquire(0)
    streamer.abort()
    reader.close()


def test_reading_a_file_that_is_gone_names_it(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    (unit, *_) = lay_out_units(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    reader = DirectReader()
    with pytest.raises(ReadError, match=r"model.safetensors"):
        load_unit(unit, reader)
    reader.close()


def test_closing_leaves_no_thread_and_fails_what_is_queued(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = threading.active_count()
    reader = DirectReader()
    reader.close()
    reader.close()
    assert threading.active_count() == before
    (unit, *_) = lay_out_units(tmp_path, tensors)
    with pytest.raises(EngineClosed):
        load_unit(unit, reader)


def test_fused_experts_are_put_together_while_they_are_read(tmp_path: Path, reader: DirectReader) -> None:
    stored = {f"{kind}{i}": torch.randn(7, 1301) for kind in ("gate", "up") for i in range(6)}
    save_file(stored, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    gate, up = ([PiecedTensor.of(entries[f"{kind}{i}"], 4) for i in range(6)] for kind in ("gate", "up"))
    fused = concatenate([stack(gate), stack(up)], dim=1)
    expected = torch.cat([torch.stack([stored[f"{kind}{i}"] for i in range(6)]) for kind in ("gate", "up")], dim=1)
    source = ParameterSource("fused", torch.float32, fused.shape, fused.pieces)
    assert torch.equal(load_unit(lay_out("u", [Part.whole("fused", source)]), reader)["fused"], expected)
    rows = lay_out("u", [Part.of_rows("fused", source, 2, 5)])
    assert torch.equal(load_unit(rows, reader)["fused"], expected[2:5])


def test_a_tensor_misaligned_for_its_dtype_is_copied_into_place(tmp_path: Path, reader: DirectReader) -> None:
    path = tmp_path / "model.safetensors"
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    values = torch.tensor([1.5, -2.5])
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xyz" + values.numpy().tobytes())
    entry = read_header(path)["b"]
    source = ParameterSource("b", torch.float32, (2,), PiecedTensor.of(entry, 4).pieces)
    assert torch.equal(load_unit(lay_out("u", [Part.whole("b", source)]), reader)["b"], values)


def test_direct_reads_are_whole_pages(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for unit in lay_out_units(tmp_path, tensors):
        for request in unit.requests:
            assert request.offset % PAGE == 0
            assert request.num_bytes % PAGE == 0
            assert request.destination is not None
            assert request.destination % PAGE == 0
