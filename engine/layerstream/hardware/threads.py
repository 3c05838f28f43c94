"""Which thread may compute.

torch's operators run on a pool of workers for every thread that ever called one (OpenMP), and once all pools together
have more threads than the machine has cores, idle workers go to sleep at once instead of waiting a moment for the next
operator: waking them then costs more than most operators do. So one thread computes, the engine's; what computes before
it starts does so on a thread that ends, because its pool ends with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


def run_apart(make: Callable[[], Result], discard: Callable[[Result], None]) -> Result:
    """What *make* returns, or raises, on a thread of its own.

    If the caller is interrupted meanwhile, *make* runs to its end, and *discard* gets what it returned.
    """
    task = _Task(make, discard)
    thread = threading.Thread(target=task.run, name="layerstream-setup", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        task.abandon()
        raise
    return task.result()


class _Task(Generic[Result]):
    def __init__(self, make: Callable[[], Result], discard: Callable[[Result], None]) -> None:
        self._make = make
        self._discard = discard
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._made: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            made = self._make()
        except BaseException as error:  # noqa: BLE001  # raised again by result()
            self._error = error
            return
        with self._lock:
            self._made.append(made)
            if self._is_abandoned:
                self._discard(made)

    def abandon(self) -> None:
        """Nobody will ask for the result."""
        with self._lock:
            self._is_abandoned = True
            for made in self._made:
                self._discard(made)

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._made[0]
