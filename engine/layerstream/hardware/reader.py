"""Reads pages from files into memory, several requests in flight, around the page cache.

Streaming a model through the page cache would evict everything else and hit nothing (a cyclic scan defeats LRU), so
files are opened for direct I/O where the file system takes it. What it takes is found by reading, not by guessing:

| probe | mode | where |
|---|---|---|
| ``O_DIRECT`` read works | ``direct`` | Linux on ext4, xfs, btrfs, most overlays |
| ``F_NOCACHE`` accepted | ``uncached`` | macOS |
| neither | ``buffered``, pages dropped behind the read where possible | tmpfs, some network file systems, Windows |

The GIL is released inside the read, so plain threads reach the disk's limit. Invariants: a request's callback is
called exactly once, on a reader thread, after its bytes are in place or with the error; requests of a lower
*priority* number are started first, equal ones in order of submission; ``close`` waits for running requests and
fails the others. Reading never writes: files are opened read-only.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from layerstream.core.sizes import PAGE, format_size
from layerstream.errors import EngineClosed, ReadError, TruncatedFile
from layerstream.hardware.arena import Arena
from layerstream.hardware.timeline import Timeline

Mode: TypeAlias = Literal["direct", "uncached", "buffered"]
Done: TypeAlias = Callable[[Exception | None], None]
Skip: TypeAlias = Callable[[], bool] | None
Consume: TypeAlias = Callable[[memoryview], None] | None

REQUEST_BYTES = 4 * 2**20  # 3 threads with 4 MiB each reached the disk's limit
ASSUMED_READ_RATE = 1e9  # bytes per second, until enough was read
ENOUGH_BYTES = 64 * 2**20  # below this a rate says little
NUM_RATES = 256  # the latest ones are looked at


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One read of whole pages ``[offset, offset + num_bytes)``.

    Attributes:
        needed_bytes: how many of them must be there; the last page may reach past the end of the file.
        destination: offset within the unit to read to, or ``None`` for a bounce buffer.
        copies: from the bounce buffer to the unit, as ``(from, to, num_bytes)``.
    """

    path: Path
    offset: int
    num_bytes: int
    needed_bytes: int
    destination: int | None
    copies: tuple[tuple[int, int, int], ...] = ()


@dataclass(slots=True)
class ReaderStats:
    """What was read so far; ``modes`` counts the files per mode, ``busy_seconds`` the time with a read under way."""

    num_requests: int = 0
    read_bytes: int = 0
    busy_seconds: float = 0.0
    modes: dict[Mode, int] = field(default_factory=dict)


class DirectReader:
    """A pool of reader threads."""

    def __init__(self, num_threads: int = 4, *, direct: bool = True) -> None:
        self.stats = ReaderStats()
        self.timeline: Timeline | None = None
        self._direct = direct
        self._files: dict[Path, _OpenFile] = {}
        self._heap: list[tuple[int, int, _Job]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._num_running = 0
        self._rate_from = (0, 0.0)
        self._rates: deque[float] = deque(maxlen=NUM_RATES)
        self._counted = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"layerstream-reader-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        request: ReadRequest,
        memory: memoryview,
        base: int,
        done: Done,
        *,
        priority: int = 1,
        skip: Skip = None,
        consume: Consume = None,
    ) -> None:
        """Queue *request* for the unit that starts at byte *base* of *memory*.

        *skip*, asked just before the read starts, may say that nobody wants it any more; *done* is called all the same.
        *consume* gets the bytes of a request without a destination, on the reader thread, valid during the call.
        """
        with self._changed:
            if self._closed:
                raise EngineClosed("the reader is closed")
            heapq.heappush(self._heap, (priority, next(self._order), _Job(request, memory, base, done, skip, consume)))
            self._changed.notify()

    def forget(self, path: Path) -> None:
        """Close *path*, which no request is queued or running for."""
        with self._changed:
            file = self._files.pop(path, None)
        if file is not None:
            os.close(file.descriptor)

    def close(self) -> None:
        """Fail what is queued, wait for what is running, close the files. Idempotent."""
        with self._changed:
            self._closed = True
            dropped, self._heap = self._heap, []
            self._changed.notify_all()
        for _, _, job in dropped:
            job.done(EngineClosed("the engine was closed while it read weights"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def _work(self) -> None:
        bounce: Arena | None = None
        while (job := self._next()) is not None:
            error: Exception | None = None
            if job.skip is None or not job.skip():
                if job.request.destination is None and (bounce is None or bounce.num_bytes < job.request.num_bytes):
                    bounce = Arena(max(REQUEST_BYTES + PAGE, job.request.num_bytes))
                self._count(1)
                started = time.perf_counter()
                try:
                    self._read(job, bounce)
                    self._note(job.request, started)
                except OSError as reason:
                    error = _read_error(job.request, reason)
                except Exception as reason:  # noqa: BLE001  # whoever waits must hear of it, whatever it is
                    error = reason
                self._count(-1)
            job.done(error)

    def rate(self) -> float | None:
        """Bytes per second that the disk was seen to bring; ``None`` before enough was read to tell.

        The highest of the latest: while the processor is busy computing, reads take longer, and nobody waits for them.
        """
        with self._changed:
            return max(self._rates, default=None)

    def restart_rate(self) -> None:
        """Measure the rate from here on: what was read so far went to memory that was touched for the first time."""
        with self._changed:
            self._rates.clear()
            self._rate_from = self.stats.read_bytes, self.stats.busy_seconds

    def _count(self, change: int) -> None:
        """One more or one fewer read is under way."""
        with self._changed:
            now = time.perf_counter()
            if self._num_running:
                self.stats.busy_seconds += now - self._counted
            self._num_running += change
            self._counted = now
            num_bytes = self.stats.read_bytes - self._rate_from[0]
            seconds = self.stats.busy_seconds - self._rate_from[1]
            if num_bytes >= ENOUGH_BYTES and seconds > 0:
                self._rates.append(num_bytes / seconds)
                self._rate_from = self.stats.read_bytes, self.stats.busy_seconds

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._heap and not self._closed:
                self._changed.wait()
            return heapq.heappop(self._heap)[2] if self._heap else None

    def _read(self, job: _Job, bounce: Arena | None) -> None:
        request = job.request
        file = self._open(request.path)
        if request.destination is not None:
            start = job.base + request.destination
            target = job.memory[start : start + request.num_bytes]
        else:
            assert bounce is not None
            target = bounce.view[: request.num_bytes]
        got = file.read(target, request.offset)
        if got < request.needed_bytes:
            raise TruncatedFile(
                f"{request.path}: the file ends at byte {request.offset + got}, but there should be some up to byte "
                f"{request.offset + request.needed_bytes}; it was changed while in use or cut short: fetch it again"
            )
        if job.consume is not None:
            job.consume(target[:got])
        if request.copies:
            source, destination = np.frombuffer(target, np.uint8), np.frombuffer(job.memory, np.uint8)
            for origin, place, length in request.copies:  # numpy releases the GIL for these
                at = job.base + place
                destination[at : at + length] = source[origin : origin + length]
        with self._changed:
            self.stats.num_requests += 1
            self.stats.read_bytes += got

    def _note(self, request: ReadRequest, started: float) -> None:
        if self.timeline is not None:
            track = threading.current_thread().name.removeprefix("layerstream-")
            name = f"{request.path.name} at {format_size(request.offset)}"
            self.timeline.add(track, name, started, time.perf_counter(), request.num_bytes)

    def _open(self, path: Path) -> _OpenFile:
        file = self._files.get(path)
        if file is None:
            with self._changed:
                file = self._files.get(path)
                if file is None:
                    file = _open_file(path, self._direct)
                    self._files[path] = file
                    self.stats.modes[file.mode] = self.stats.modes.get(file.mode, 0) + 1
        return file


@dataclass(frozen=True, slots=True)
class _Job:
    request: ReadRequest
    memory: memoryview
    base: int
    done: Done
    skip: Skip
    consume: Consume


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    mode: Mode
    seek_lock: threading.Lock

    def read(self, target: memoryview, offset: int) -> int:
        """Fill *target* from *offset*; fewer bytes only at the end of the file."""
        done = 0
        while done < len(target):
            got = self._read_once(target[done:], offset + done)
            if got == 0:
                break
            done += got
            if self.mode == "direct" and done % PAGE:
                break  # an unaligned count means the end of the file; another direct read would be refused
        if self.mode == "buffered" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def _read_once(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [target], offset)
        with self.seek_lock:  # Windows has no positioned read
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            data = os.read(self.descriptor, len(target))
        target[: len(data)] = data
        return len(data)


def _open_file(path: Path, direct: bool) -> _OpenFile:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    if direct and hasattr(os, "O_DIRECT"):
        descriptor = _open_direct(path, flags | os.O_DIRECT)
        if descriptor is not None:
            return _OpenFile(descriptor, "direct", threading.Lock())
    descriptor = os.open(path, flags)
    mode: Mode = "buffered"
    if direct and hasattr(os, "preadv"):
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined]  # macOS only
            mode = "uncached"
    return _OpenFile(descriptor, mode, threading.Lock())


def _open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that a direct read was seen to work on, or ``None``."""
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    try:
        os.preadv(descriptor, [Arena(PAGE).view], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _read_error(request: ReadRequest, reason: OSError) -> ReadError:
    error = ReadError(
        f"{request.path}: reading {format_size(request.num_bytes)} at byte {request.offset} failed: {reason}; the "
        "requests of this sweep fail, the next one tries again"
    )
    error.errno = reason.errno
    error.__cause__ = reason
    return error
