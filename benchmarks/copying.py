"""What handing a unit to an accelerator costs in Python: processor time of all threads, and how often they wake.

    python -m benchmarks.copying [--units 200] [--sweeps 20] [--switch 0.005]

The device of it does nothing: copies are over when they are asked for. What is left is the engine's own work for each
unit, on the thread that computes and on the copier's, which share one interpreter lock. Units are of a few kilobytes;
``host``: they stay in host memory, ``disk``: they come from a file in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.copy_feed import CopyFeed
from layerstream.streaming.host_source import HostSource
from layerstream.streaming.streamer import Streamer

from benchmarks import bench
from tests.streaming.units import write_units


class Reached:
    """A mark that is reached, or only waited for by a lane."""

    def __init__(self, *, is_reached: bool) -> None:
        self._is_reached = is_reached

    def wait(self) -> None:
        """At once."""

    def is_reached(self) -> bool:
        """Whether a copy is over before its unit is wanted."""
        return self._is_reached

    def seconds_since(self, earlier: Reached) -> float:
        """None."""
        return 0.0


class NoLane:
    """Does nothing, at once."""

    def __init__(self, *, is_early: bool) -> None:
        self._mark = Reached(is_reached=is_early)
        self.num_calls = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Nothing."""
        self.num_calls += 1

    def mark(self, *, timed: bool = False) -> Reached:
        """Always the same."""
        self.num_calls += 1
        return self._mark

    def after(self, mark: Any) -> None:
        """Nothing."""
        self.num_calls += 1


class NoDevice:
    """Memory, and lanes that do nothing; *is_early*: copies are over before their units are wanted."""

    torch_device = torch.device("cpu")
    name = "nothing"

    def __init__(self, *, is_early: bool) -> None:
        self.compute, self.inward, self.outward = (NoLane(is_early=is_early) for _ in range(3))

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do."""
        return contextlib.nullcontext()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Of the host."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def pin(self, arena: Arena) -> None:
        """Nothing."""

    def unpin(self, arena: Arena) -> None:
        """Nothing."""

    def limit(self, num_bytes: int) -> None:
        """Nothing."""

    def peak_bytes(self) -> int:
        """Nothing."""
        return 0

    def free_unused(self) -> None:
        """Nothing."""

    def is_lost(self, error: BaseException) -> bool:
        """Never."""
        return False


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument(
        "--switch", type=float, default=sys.getswitchinterval(), help="seconds, of the interpreter lock"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.setswitchinterval(options.switch)
    found = {}
    for place in ("host", "disk"):
        for is_early in (True, False):
            name = f"{place}, copies {'early' if is_early else 'waited for'}"
            found[name] = measure(place, options.units, options.sweeps, is_early=is_early)
    rows = [[name, *(f"{value:.1f}" for value in values.values())] for name, values in found.items()]
    bench.show("A unit, microseconds", ["weights", *next(iter(found.values()))], rows)
    print(bench.save("copying", {"switch_seconds": options.switch, "microseconds": found}, options.json))


def measure(place: str, num_units: int, num_sweeps: int, *, is_early: bool) -> dict[str, float]:
    """Of a unit: processor time in all threads and in the one that computes, time on the clock, microseconds; calls of
    the device; how often a thread gave up the processor."""
    device, reader = NoDevice(is_early=is_early), DirectReader(num_threads=2)
    with tempfile.TemporaryDirectory() as folder:
        _, layouts = write_units(Path(folder), num_units)
        largest = max(layout.num_bytes for layout in layouts)
        residents = set(range(num_units)) if place == "host" else set()
        source = HostSource(device, layouts, residents, 4 * largest, reader)
        feed = CopyFeed(layouts, 4 * largest, device, source)
        streamer = Streamer(feed, num_cycle=num_units)
        _sweep(streamer, num_units)
        lanes = (device.compute, device.inward)
        calls, switches = sum(lane.num_calls for lane in lanes), _switches()
        began = time.perf_counter(), time.process_time(), time.thread_time()
        for _ in range(num_sweeps):
            _sweep(streamer, num_units)
        wall, process, own = (
            now - then
            for now, then in zip((time.perf_counter(), time.process_time(), time.thread_time()), began, strict=True)
        )
        count, calls = num_units * num_sweeps, sum(lane.num_calls for lane in lanes) - calls
        switches = _switches() - switches
        streamer.close()
        reader.close()
    times = {"all threads": process, "the computing one": own, "on the clock": wall}
    found = {name: 1e6 * seconds / count for name, seconds in times.items()}
    return {**found, "calls of the device": calls / count, "switches": switches / count}


def _sweep(streamer: Streamer, num_units: int) -> None:
    streamer.begin(with_tail=False)
    for unit in range(num_units):
        streamer.acquire(unit)
        streamer.release(unit)
    streamer.end()


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


if __name__ == "__main__":
    main()
