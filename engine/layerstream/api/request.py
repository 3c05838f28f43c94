"""A :class:`Request`: what a caller holds while the engine works on its prompt.

The engine's thread writes (``push``, ``finish``, ``fail``), any thread or event loop reads. Invariants: deltas are
only appended; a request is done exactly once, with a completion per answer or with an error; callbacks run once, on
the thread that finished it (or at once, if it was done before), and what they raise is logged and goes no further. In
a forked child, and for waiting on the engine's own thread, a request answers with an error
(:mod:`layerstream.api.home`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from layerstream.api import arguments
from layerstream.api.bell import Bell
from layerstream.api.completion import Completion, Delta
from layerstream.api.home import Home
from layerstream.errors import RequestTimeout

logger = logging.getLogger(__name__)


class Request:
    """A prompt on its way; ``n`` answers come out of it, or those that *choose* takes of them when all are there.

    Iterating gives the deltas as they come, ``await`` and :meth:`result` the (first) completion.
    """

    def __init__(
        self,
        num_answers: int,
        on_cancel: Callable[[Request], None],
        choose: Callable[[list[Completion]], list[Completion]] | None = None,
        home: Home | None = None,
    ) -> None:
        self._home = home or Home()
        self._on_cancel = on_cancel
        self._choose = choose
        self._lock = threading.Lock()
        self._deltas: list[Delta] = []
        self._completions: list[Completion | None] = [None] * num_answers
        self._error: BaseException | None = None
        self._is_done = False
        self._watchers: list[Callable[[], None]] = []

    def result(self, timeout: float | None = None) -> Completion:
        """The first completion; waits for all of them.

        Raises:
            RequestTimeout: it was not there after *timeout* seconds; the request goes on.
            LayerStreamError: the request failed, with the cause.
        """
        return self.completions(timeout)[0]

    def completions(self, timeout: float | None = None) -> list[Completion]:
        """All ``n`` completions; raises as :meth:`result` does."""
        wait = arguments.seconds("timeout", timeout)
        self._home.check()
        if not self._wait_for(lambda: self._is_done, wait):
            raise RequestTimeout(f"no answer within {wait:g} seconds; the request goes on: wait again or cancel")
        if self._error is not None:
            raise self._error
        return [completion for completion in self._completions if completion is not None]

    def cancel(self) -> None:
        """Give up: by the next sweep the request is gone, its completion says ``"cancelled"``. Idempotent."""
        if not self.done():
            self._on_cancel(self)

    def done(self) -> bool:
        """Whether the completions, or an error, are there."""
        self._home.check()
        with self._lock:
            return self._is_done

    def exception(self) -> BaseException | None:
        """Why the request failed; ``None`` if it did not, or is not done."""
        self._home.check()
        with self._lock:
            return self._error

    def add_done_callback(self, callback: Callable[[Request], Any]) -> None:
        """Call *callback* with this request when it is done, on the engine's thread; at once if it is.

        It has to be quick: the engine waits for it. What it raises is logged.
        """
        arguments.function("callback", callback)
        self._home.check()

        def watcher() -> None:
            if self._is_done:
                callback(self)

        with self._lock:
            if not self._is_done:
                self._watchers.append(watcher)
                return
        _call(watcher)

    def __iter__(self) -> Iterator[Delta]:
        self._home.check()
        return self._iterate()

    def _iterate(self) -> Iterator[Delta]:
        position = 0
        while True:
            self._home.check()
            self._wait_for(lambda at=position: self._is_done or len(self._deltas) > at)
            with self._lock:
                fresh, error, is_done = self._deltas[position:], self._error, self._is_done
            yield from fresh
            position += len(fresh)
            if is_done:
                if error is not None:
                    raise error
                return

    def _wait_for(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until *holds* does; false: it does not after *seconds*. Ctrl-C leaves the request as it is."""
        if holds():
            return True
        self._home.check_may_wait()
        end = None if seconds is None else time.monotonic() + seconds
        bell = Bell()
        with self._lock:
            self._watchers.append(bell.ring)
        try:
            while not holds():
                if not bell.wait(None if end is None else max(0.0, end - time.monotonic())):
                    return holds()
            return True
        finally:
            self._forget(bell.ring)

    def _forget(self, watcher: Callable[[], None]) -> None:
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._finished().__await__()

    async def _finished(self) -> Completion:
        async for _ in self:
            pass
        return self.result()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._home.check()
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        watcher = lambda: _wake(loop, changed)  # noqa: E731  # compared by identity below
        with self._lock:
            self._watchers.append(watcher)
        position = 0
        try:
            while True:
                changed.clear()
                with self._lock:
                    fresh, error, is_done = self._deltas[position:], self._error, self._is_done
                for delta in fresh:
                    yield delta
                position += len(fresh)
                if is_done:
                    if error is not None:
                        raise error
                    return
                await changed.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancel()
            raise
        finally:
            self._forget(watcher)

    def push(self, delta: Delta) -> None:
        """The engine: a sweep added *delta*; with a completion, that answer is finished."""
        with self._lock:
            if self._is_done:
                return
            if self._choose is None:
                self._deltas.append(delta)
            if delta.completion is not None:
                self._completions[delta.index] = delta.completion
                if all(completion is not None for completion in self._completions):
                    if self._choose is not None:
                        self._deliver_chosen(self._choose)
                    self._is_done = True
        self._tell()

    def _deliver_chosen(self, choose: Callable[[list[Completion]], list[Completion]]) -> None:
        chosen = choose([completion for completion in self._completions if completion is not None])
        self._completions = list(chosen)
        for index, completion in enumerate(chosen):
            self._deltas.append(
                Delta(completion.text, completion.token_ids, completion.finish_reason, index, completion)
            )

    def fail(self, error: BaseException) -> None:
        """The engine: the request ends with *error*."""
        with self._lock:
            if self._is_done:
                return
            self._error, self._is_done = error, True
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            watchers = list(self._watchers)
            if self._is_done:
                self._watchers.clear()
        for watcher in watchers:
            _call(watcher)


def _call(watcher: Callable[[], None]) -> None:
    try:
        watcher()
    except BaseException:  # even sys.exit() in a caller's callback must not stop the engine
        logger.exception("a request's callback failed")


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
