"""Work that takes a moment, apart from the event loop: what async callers of wrappers have tokenised and handed in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


async def apart(make: Callable[[], Made], undo: Callable[[Made], object] | None = None) -> Made:
    """What *make* returns, or raises, on a thread with the caller's context variables; the event loop goes on.

    Args:
        undo: called with what was made, if whoever waits is cancelled meanwhile: a thread cannot be stopped.
    """
    making = asyncio.ensure_future(asyncio.to_thread(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda done: _undo(done, undo))
        raise


def _undo(done: asyncio.Future[Made], undo: Callable[[Made], object] | None) -> None:
    if not done.cancelled() and done.exception() is None and undo is not None:
        undo(done.result())
