"""A :class:`Bell`: wakes a thread that waits, and survives Ctrl-C.

A :class:`threading.Condition` does not: it is written in Python, and a ``KeyboardInterrupt`` between two of its lines
leaves its lock released, or held for good. A bell is a queue of the interpreter's own, whose calls are done or not.
"""

from __future__ import annotations

import queue


class Bell:
    """For one thread that waits and any number that ring.

    Whoever rings changed before what the other looks at; whoever waits looks at it afterwards: no ring is missed.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wake whoever waits, or the next who does."""
        if self._rings.empty():
            self._rings.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Until it rings; false: it did not for *seconds*."""
        try:
            self._rings.get(timeout=seconds)
        except queue.Empty:
            return False
        self.still()
        return True

    def still(self) -> None:
        """Forget the rings so far."""
        while not self._rings.empty():
            self._rings.get_nowait()
