"""Measures what forecasts need: a few seconds, :data:`TIMES` times per machine; formats when they are first met.

What was measured is kept (:mod:`layerstream.setup.known_rates`), the best of it, and holds until torch, the number of
threads or the processor changes. A disk is known by its device number, so models on two disks have two rates.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F

from layerstream.checkpoint.hub import are_weights_here, bundled_reader
from layerstream.checkpoint.names import PackedSource
from layerstream.core.formats import FORMATS, KERNELS
from layerstream.core.sizes import PAGE
from layerstream.hardware.accelerators import accelerator_of, open_device
from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import REQUEST_BYTES, DirectReader, ReadRequest
from layerstream.hardware.remembered import machine_name
from layerstream.model.kernels import sample_matrix
from layerstream.model.linear import TILE_VALUES, PackedMatrix, tile_rows
from layerstream.model.matrices import packed_parts
from layerstream.model.skeleton import Skeleton
from layerstream.planner.rates import Rates
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.known_rates import KnownRates, disk_name
from layerstream.setup.open_store import weight_paths
from layerstream.setup.stepping import step_greedily
from layerstream.streaming.layout import lay_out
from layerstream.streaming.loader import Countdown, load_unit

logger = logging.getLogger(__name__)

TIMES = 3  # forecasts that measure: the machine may be busy during one of them
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
SIZE = 4096  # of the matrices that are multiplied by
NUM_MATRICES = 6  # too many for any cache
DISK_SECONDS = 1.5
OVERLAP_SECONDS = 0.8
IN_FLIGHT = 16  # reads
LINK_BYTES = 256 * 2**20
REPEATS = 3


def rates_for(skeleton: Skeleton, device: torch.device, *, again: bool = False) -> Rates:
    """What the machine does with the model of *skeleton*; measured now where it is not known well, or *again*, and then
    nothing of what was known counts."""
    known, name, dtype = KnownRates(), machine_name(device), str(skeleton.dtype).removeprefix("torch.")
    rates = None if again else known.rates(name)
    is_sure = rates is not None and dtype in rates.products and rates.num_measured >= TIMES
    if rates is None or not is_sure:
        measured = measure(device, skeleton.dtype)
        rates = measured if rates is None else rates.best_of(measured)
    file = weights_file(skeleton)
    is_here = are_weights_here(file.parent)
    if not is_here:  # then of the disk that this package is on
        file = bundled_reader() / "model.safetensors"
    disk = disk_name(file)
    rate = (None if again else known.disk(disk)) or 0.0
    if not rate or not is_sure:
        rate = max(rate, measure_disk(file))
    formats = _formats(skeleton) if is_here else {}
    missing = [source for codec, source in formats.items() if again or codec not in rates.decode]
    decode = {source.codec.name: measure_decode(source, skeleton.dtype) for source in missing}
    if accelerator_of(device) is None and (not is_sure or not rates.read_cost):
        cost = measure_read_cost(file, skeleton.dtype)
        rates = dataclasses.replace(rates, read_cost=min(rates.read_cost or cost, cost))
    rates = dataclasses.replace(rates, disk=rate, decode={**rates.decode, **decode})
    known.write(name, rates, disk)
    return rates


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """What does not depend on the model."""
    opened = open_device(device)
    if opened is not None:
        with opened.use():
            return _measure(device, dtype)
    return _measure(device, dtype)


def measure_disk(file: Path, num_rounds: int | None = None) -> float:
    """Bytes per second of direct reads of *file*, over and over if it is small; *num_rounds* or for a moment."""
    size = min(REQUEST_BYTES, file.stat().st_size // PAGE * PAGE) or PAGE
    num_places = max(1, file.stat().st_size // size)
    arena, reader = Arena(IN_FLIGHT * size), DirectReader()
    rounds: deque[Countdown] = deque()

    def submit(number: int) -> None:
        rounds.append(countdown := Countdown(IN_FLIGHT))
        for place in range(IN_FLIGHT):
            start = (number * IN_FLIGHT + place) % num_places * size
            reader.submit(ReadRequest(file, start, size, 0, place * size), arena.view, 0, countdown)

    try:
        submit(0)  # the first round touches the memory
        rounds.popleft().wait()
        submit(1)
        started, done = time.perf_counter(), 0
        while done < num_rounds if num_rounds else time.perf_counter() - started < DISK_SECONDS:
            submit(done + 2)
            rounds.popleft().wait()
            done += 1
        seconds = time.perf_counter() - started
        rounds.popleft().wait()
        return done * IN_FLIGHT * size / seconds
    finally:
        reader.close()


def measure_read_cost(file: Path, dtype: torch.dtype) -> float:
    """What reading takes from the compute beside it, as a share of the time that the read takes."""
    weights = [torch.ones((SIZE, SIZE), dtype=dtype) for _ in range(NUM_MATRICES)]
    inputs = torch.ones((1, SIZE), dtype=dtype)
    one = _best(lambda: [F.linear(inputs, weight) for weight in weights])
    times = max(1, int(OVERLAP_SECONDS / one))
    rate = measure_disk(file)
    num_reads = max(1, int(OVERLAP_SECONDS * rate / (IN_FLIGHT * REQUEST_BYTES)))
    reading = threading.Thread(target=measure_disk, args=(file, num_reads))
    started = time.perf_counter()
    reading.start()
    for _ in range(times):
        for weight in weights:
            F.linear(inputs, weight)
    reading.join()
    both = time.perf_counter() - started
    read, compute = num_reads * IN_FLIGHT * REQUEST_BYTES / rate, times * one
    return min(1.0, max(0.01, (both - compute) / read))


def measure_decode(source: PackedSource, dtype: torch.dtype) -> float:
    """Seconds per weight of decoding matrices that are stored like *source*."""
    reader = DirectReader(1)
    try:
        tensors = load_unit(lay_out(source.name, list(packed_parts(source, None))), reader)
    finally:
        reader.close()
    planes = {name: tensors[plane.name] for name, plane in source.planes.items()}
    rows, columns = source.shape
    scratch = torch.empty(tile_rows(source.codec, rows, columns) * columns, dtype=dtype)
    return _decode_seconds(PackedMatrix(source.codec, planes, 0, rows, columns, scratch))


def weights_file(skeleton: Skeleton) -> Path:
    """The largest file of weights, links followed."""
    return max(map(Path.resolve, weight_paths(skeleton)), key=lambda path: path.stat().st_size)


def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    process_bytes = psutil.Process().memory_info().rss
    name = str(dtype).removeprefix("torch.")
    products: dict[str, dict[int, float]] = {name: dict(_products(device, dtype))}
    decode = {kind: _decode_seconds(matrix) for kind, matrix in _samples(dtype)}
    kind = accelerator_of(device)
    if kind is None:
        for kernel in KERNELS:
            with suppress(RuntimeError, NotImplementedError, AttributeError):
                products[kernel] = dict(_kernel_products(kernel))
    return Rates(
        disk=0.0,
        link=None if kind is None else link_rate(device),
        products=products,
        cached={name: dict(_cached_products(device, dtype))},
        decode=decode,
        layer_seconds=_layer_seconds(device),
        value_seconds=_value_seconds(device, dtype),
        num_measured=1,
        process_bytes=process_bytes,
        device_bytes=0 if kind is None else kind.beside_bytes(device),
    )


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    weights = [torch.ones((SIZE, SIZE), dtype=dtype, device=device) for _ in range(NUM_MATRICES)]
    for rows in ROWS:
        inputs = torch.ones((rows, SIZE), dtype=dtype, device=device)
        yield rows, _best(lambda x=inputs: [F.linear(x, weight) for weight in weights], device) / _values(weights)


def _cached_products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    tile = torch.ones((TILE_VALUES // SIZE, SIZE), dtype=dtype, device=device)
    for rows in ROWS:
        inputs = torch.ones((rows, SIZE), dtype=dtype, device=device)
        yield rows, _best(lambda x=inputs: [F.linear(x, tile) for _ in range(8)], device) / (8 * tile.numel())


def _kernel_products(kernel: str) -> Iterator[tuple[int, float]]:
    matrices = [sample_matrix(KERNELS[kernel].name) for _ in range(NUM_MATRICES)]
    rows_of, columns = matrices[0].last, matrices[0].columns
    for rows in ROWS[:5]:
        inputs = torch.ones((rows, columns), dtype=torch.bfloat16)
        seconds = _best(lambda x=inputs: [matrix.product(x) for matrix in matrices])
        yield rows, seconds / (NUM_MATRICES * rows_of * columns)


def _layer_seconds(device: torch.device) -> float:
    """From the bundled reader, whose products are next to nothing."""
    config = EngineConfig("demo", device=str(device), memory_bytes=2**30, kv_store=None, speculation="off")
    parts = assemble(config, None)
    try:
        prompt = [[5, 6, 7]]
        step_greedily(parts, prompt, 4)
        before, started = parts.step.num_sweeps, time.perf_counter()
        step_greedily(parts, prompt, 12)
        seconds = (time.perf_counter() - started) / (parts.step.num_sweeps - before)
        return seconds / parts.plan.facts.num_layers
    finally:
        parts.close()


def _value_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """What an MLP does to gate and up, per value."""
    gate, up = (torch.ones((128, 2 * SIZE), dtype=dtype, device=device) for _ in range(2))
    return _best(lambda: [F.silu(gate) * up for _ in range(8)], device) / (8 * gate.numel())


def link_rate(device: torch.device) -> float:
    opened = open_device(device)
    assert opened is not None
    arena = Arena(LINK_BYTES)
    opened.pin(arena)
    try:
        target = opened.allocate(LINK_BYTES)

        def copy() -> None:
            opened.inward.copy(target, arena.tensor)
            opened.inward.mark().wait()

        return LINK_BYTES / _best(copy)
    finally:
        opened.unpin(arena)


def _best(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of the fastest of a few times: what else the machine did made the others longer."""
    kind = None if device is None else accelerator_of(device)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device is not None and kind is not None:
            kind.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _samples(dtype: torch.dtype) -> Iterator[tuple[str, PackedMatrix]]:
    """A matrix of each format that ``quantization=`` makes."""
    return ((kind, sample_matrix(kind, dtype)) for kind in FORMATS)


def _decode_seconds(matrix: PackedMatrix) -> float:
    """Per weight."""
    return _best(lambda: [None for _ in matrix.tiles()]) / ((matrix.last - matrix.first) * matrix.columns)


def _values(weights: list[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _formats(skeleton: Skeleton) -> dict[str, PackedSource]:
    """A quantised matrix of each format."""
    packed = [source for source in skeleton.sources.values() if isinstance(source, PackedSource)]
    return {source.codec.name: source for source in packed if len(source.shape) == 2}
