"""The physical limit: the same bytes, read directly by plain threads, with nothing else going on.

Shares no code with the library's reader, so that a mistake there cannot lower the bar.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

BLOCK = 4 * 2**20
PAGE = 4096

Range = tuple[Path, int, int]  # file, first byte, number of bytes


def raw_read(ranges: Sequence[Range], num_threads: int) -> float:
    """Seconds to read *ranges* in order, in blocks of 4 MiB, ``num_threads`` at a time."""
    jobs = iter([job for path, first, size in ranges for job in _blocks(path, first, size)])
    descriptors = {path: _open(path) for path, _, _ in ranges}
    lock = threading.Lock()

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, BLOCK))
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            path, first, size = job
            os.preadv(descriptors[path], [buffer[:size]], first)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds


def _blocks(path: Path, first: int, size: int) -> list[Range]:
    start, stop = first // PAGE * PAGE, -(-(first + size) // PAGE) * PAGE
    return [(path, at, min(BLOCK, stop - at)) for at in range(start, stop, BLOCK)]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # tmpfs: there is no disk to measure then, only memory
        return os.open(path, os.O_RDONLY)
