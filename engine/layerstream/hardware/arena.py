"""Page-aligned memory of the host, allocated once for the life of the engine: for direct I/O and copies to devices."""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from layerstream.core.sizes import PAGE, format_size
from layerstream.errors import OutOfMemory

POPULATED_AT_ONCE = 8 * 2**20
_MADV_POPULATE_WRITE = 23
HUGE = 4 * 2**20  # below this, rounding up to 2 MiB pages would cost more than it saves


class Arena:
    """Page-aligned host memory, touched only where it is written.

    Attributes:
        view: the bytes, for ``readv``.
        tensor: the same bytes as a ``(num_bytes,)`` uint8 tensor, for parameters that are views into it.

    Raises:
        OutOfMemory: the system has not as much.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(PAGE, -(-num_bytes // PAGE) * PAGE)
        try:
            memory = mmap.mmap(-1, self.num_bytes)
        except OSError as error:
            raise OutOfMemory(
                f"the system does not give {format_size(self.num_bytes)} of memory in one piece: pass a smaller "
                "memory=, or end what else runs"
            ) from error
        if self.num_bytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memory
        if (owner := _OWNER.get()) is not None:
            owner.add(memory)
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def populate(self, is_stopped: Callable[[], bool]) -> None:
        """Have the system back all of it with memory now, where it can be asked to, until it *is_stopped*.

        What is there already stays.
        """
        for start in range(0, self.num_bytes, POPULATED_AT_ONCE):  # so that other threads' page faults are not held up
            if is_stopped():
                return
            with contextlib.suppress(OSError, ValueError, AttributeError):  # before Linux 5.14, or another system
                self._memory.madvise(_MADV_POPULATE_WRITE, start, min(POPULATED_AT_ONCE, self.num_bytes - start))


class Arenas:
    """Those that are made while it collects; they are freed together when it is closed.

    So what is closed takes no memory, even if somebody still holds it, or a tensor that lies there.
    """

    def __init__(self) -> None:
        self._memories: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # tensors keep these, and no arena

    def add(self, memory: mmap.mmap) -> None:
        """*memory* is freed with the others."""
        self._memories.add(memory)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, arenas that this thread makes are added."""
        token = _OWNER.set(self)
        try:
            yield
        finally:
            _OWNER.reset(token)

    def close(self) -> None:
        """Free them; nothing may be under way there, and what is read there afterwards is zeros. Idempotent."""
        for memory in list(self._memories):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # another system
                memory.madvise(mmap.MADV_REMOVE)


_OWNER: ContextVar[Arenas | None] = ContextVar("arenas", default=None)


class Populating:
    """Has the system back *arena* with memory ahead, on a thread of its own, until it is closed."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._is_closed = threading.Event()
        self._thread = threading.Thread(
            target=arena.populate, args=(self._is_closed.is_set,), name=f"layerstream-{name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """It ends within a few megabytes. Idempotent."""
        self._is_closed.set()
        self._thread.join()
