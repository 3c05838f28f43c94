"""Where an engine lives: one process, and one thread of it. Who is elsewhere is told so, and never waits.

A forked child has a copy of the engine's memory, and none of its threads: whoever waits there waits for ever, and locks
that another thread held at the fork are held for good. So everything that a caller can reach asks here before it takes
any lock. On the engine's own thread, in a callback, waiting is what cannot end.
"""

from __future__ import annotations

import os
import threading

from layerstream.errors import EngineClosed, WaitsForItself


class Home:
    """This process; the engine's thread is told later, by :meth:`move_in`."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._thread: int | None = None

    def move_in(self) -> None:
        """The calling thread is the engine's."""
        self._thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether this is the engine's process."""
        return os.getpid() == self._process

    @property
    def is_own_thread(self) -> bool:
        """Whether this is the engine's thread."""
        return threading.get_ident() == self._thread

    def check(self) -> None:
        """Return in the engine's process.

        Raises:
            EngineClosed: this is another one.
        """
        if not self.is_here:
            raise EngineClosed(
                f"this engine belongs to process {self._process}, and a forked child ({os.getpid()}) has none of its "
                "threads: make the LayerStream in the child, after the fork (gunicorn without --preload, "
                "multiprocessing with 'spawn', celery's worker_process_init)"
            )

    def check_may_wait(self) -> None:
        """Return where waiting for the engine can end.

        Raises:
            EngineClosed: this is another process.
            WaitsForItself: this is the engine's own thread.
        """
        self.check()
        if self.is_own_thread:
            raise WaitsForItself(
                "a callback on the engine's thread cannot wait for an answer of this engine: submit() and add a "
                "callback to the new request, or hand the work to another thread"
            )
