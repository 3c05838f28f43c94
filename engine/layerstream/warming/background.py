"""A run on a thread of its own, which gives way to questions: :class:`Warming`, its handle.

The engine takes a group of prefixes only while nobody asks, and cancels it when a question arrives, before the next
sweep begins: a question waits for the sweep under way at most, and no row of warming is ever in a sweep with one
(``runtime/idle_work.py``).

Invariants: the thread ends when the run is done, cancelled or failed, or the engine is closed; whatever it dies of is
kept for :meth:`Warming.wait` and goes no further; what is stored stays. While it runs it holds the engine; once it is
over, nothing of the engine, whoever keeps the handle: of the run its figures are left, and where an error was raised is
a note of it, because frames hold their variables.
"""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerstream.api import arguments
from layerstream.api.home import Home
from layerstream.api.request import Request
from layerstream.errors import EngineClosed, RequestTimeout
from layerstream.text.prompt import Prompt
from layerstream.warming.prefixes import Submit
from layerstream.warming.run import WarmReport, WarmRun

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between looks at whether somebody asks

WarmState = Literal["running", "paused", "done", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """How far warming in the background is.

    Attributes:
        state: ``"running"``; ``"paused"`` while questions are answered; ``"done"``, ``"cancelled"`` or ``"failed"``.
        done: documents that are stored, of ``documents`` that are to be.
        computed_tokens: tokens that it has added to the store.
    """

    state: WarmState
    done: int
    documents: int
    computed_tokens: int


class Warming:
    """Warming that goes on in the background: what ``engine.warm(..., background=True)`` returns.

    Args:
        run: what is done; its hooks are set here.
        home: where the engine lives.
    """

    def __init__(self, run: WarmRun, home: Home) -> None:
        self._run: WarmRun | None = run
        self._home = home
        self._left = 0, 0, 0  # of the run, once it is over
        self._stop = threading.Event()
        self._over = threading.Event()
        self._state: WarmState = "running"
        self._report: WarmReport | None = None
        self._error: BaseException | None = None
        run.submit = functools.partial(self._submit_and_say, run.submit)
        run.should_stop, run.wait_for_turn = self._stop.is_set, lambda: self._stop.wait(POLL_SECONDS)
        self._thread = threading.Thread(target=self._work, name="layerstream-warming", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> WarmProgress:
        """How far it is."""
        self._home.check()
        return WarmProgress(self._state, *self._figures())

    def cancel(self) -> None:
        """Stop by the next sweep; what is stored stays. Idempotent."""
        self._home.check()
        self.stop()

    def done(self) -> bool:
        """Whether it has ended, however."""
        self._home.check()
        return self._over.is_set()

    def exception(self) -> BaseException | None:
        """Why it failed; ``None`` if it did not, or has not ended."""
        self._home.check()
        return self._error

    def wait(self, timeout: float | None = None) -> WarmReport:
        """What was done, when it is done or was cancelled.

        Raises:
            RequestTimeout: it has not ended after *timeout* seconds; it goes on.
            EngineClosed: the engine was closed before it was done. Other errors: what it died of.
        """
        seconds = arguments.seconds("timeout", timeout)
        self._home.check_may_wait()
        if not self._over.wait(seconds):
            raise RequestTimeout(f"warming has not ended within {seconds:g} seconds; it goes on: wait again or cancel")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def stop(self) -> None:
        """The engine: end it, without a look at whose process this is."""
        self._stop.set()
        run = self._run
        for request in [] if run is None else run.requests:
            request.cancel()

    def join(self) -> None:
        """The engine: return when its thread has ended, unless this is it."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        assert self._run is not None, "it is let go of at the end"
        error: BaseException | None = None
        try:
            self._report = self._run.run()
            state: WarmState = "cancelled" if self._stop.is_set() else "done"
        except EngineClosed as closed:
            error, state = closed, "cancelled"
        except BaseException as failure:  # noqa: BLE001  # it is the handle's, and no reason for the engine to end
            error, state = failure, "failed"
            logger.warning("warming in the background ended: %s", failure)
        self._left = self._figures()
        self._run = None
        self._error, self._state = None if error is None else _without_frames(error), state
        self._over.set()

    def _figures(self) -> tuple[int, int, int]:
        """Documents done and to do, and tokens computed."""
        run = self._run
        if run is None:
            return self._left
        return run.done, max(run.done, run.forecast.chosen), run.computed_pages * run.prefixes.page_tokens

    def _submit_and_say(self, submit: Submit, prompts: Sequence[Prompt]) -> list[Request] | None:
        requests = submit(prompts)
        self._state = "paused" if requests is None else "running"
        return requests

    def __repr__(self) -> str:
        done, documents, _ = self._figures()
        return f"<Warming {self._state}, {done} of {documents}>"


def _without_frames(error: BaseException) -> BaseException:
    """*error*, which says in words where it was raised, and what it came from."""
    error.add_note("in the thread that warmed:\n" + "".join(traceback.format_exception(error)).rstrip())
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            found += each.__cause__, each.__context__
    return error
