"""The thread that asks a tier, so that nobody else waits for a disk or another process; and what is done when it fails.

States, and who changes them:

| state | the tier | next |
|---|---|---|
| hashing | is being opened for the first time, or anew because it was replaced | ready, off, unusable |
| ready | answers | off, by whatever error; hashing, when its folder is another one now |
| off | failed; closed by this thread; nobody waits for it | hashing, when it is due again |
| unusable | will not be had any more | |

Invariants:

* :meth:`TierConnection.failed` alone decides that a tier is off, and says so once, with the reason;
* callers never see an error of the tier, and wait for an answer no longer than they say; a tier that owes one for
  ``ANSWER_SECONDS`` has failed;
* posts and questions are dealt with in order; they are dropped while there is no tier;
* a tier is closed when nobody borrows it, on this thread. Its open runs stay readable.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar

from layerstream.store.database import IndexReplaced, explain
from layerstream.store.outage import Outage
from layerstream.store.tiers.base import Tier

logger = logging.getLogger(__name__)

State = Literal["off", "hashing", "ready", "unusable"]

OpenTier = Callable[[Callable[[], bool]], Tier | None]
"""Takes the digests it needs (asked now and then whether to stop) and opens the tier; ``None``: it cannot be used."""

STORE_ERRORS = (OSError, sqlite3.Error)
ANSWER_SECONDS = 3.0
PATIENCE_SECONDS = 0.02  # that the engine's thread gives a tier that has kept up so far
CALM_SECONDS = 1.0  # after it was opened: a tier that is replaced sooner has failed
UNWANTED_SECONDS = 5.0  # after which nobody is going to come for an answer


T = TypeVar("T")


class Question(Generic[T]):
    """Something to ask a tier.

    Args:
        put: asks it.
        undo: called with the answer if nobody comes for it.
    """

    def __init__(self, put: Callable[[Tier], T], undo: Callable[[Tier, T], None] | None = None) -> None:
        self.put = put
        self.undo = undo
        self.asked_at: float | None = None
        self.answered_at: float | None = None
        self.answer: T | None = None


class TierConnection:
    """A tier, as long as there is one; nothing is answered before ``start``.

    Args:
        open_tier: opens it; again after a failure. Called on this thread.
        tier: it is open already.
        failure: why it could not be opened.
        on_change: called when it is there, and when it is not any more; any thread, no lock held.
    """

    def __init__(
        self,
        open_tier: OpenTier,
        tier: Tier | None,
        failure: Exception | None,
        on_change: Callable[[], None],
    ) -> None:
        self._open_tier = open_tier
        self._tier = tier
        self._on_change = on_change
        self._changed = threading.Condition()
        self._work: deque[Callable[[Tier], None] | Question[Any]] = deque()
        self._answered: list[Question[Any]] = []
        self._retired: list[Tier] = []
        self._num_lent = 0
        self._is_behind = False
        self._is_closing = False
        self._is_unusable = False
        self._outage = Outage()
        self._is_off = False
        self._opened_at = time.monotonic()
        if failure is not None:
            self.failed(failure, None)
        self._thread = threading.Thread(target=self._serve, name="layerstream-kv-index", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def tier(self) -> Tier | None:
        """The tier, if it is there."""
        return self._tier

    @property
    def state(self) -> State:
        """What can be expected of it."""
        if self._is_unusable:
            return "unusable"
        if self._tier is not None:
            return "ready"
        return "off" if self._is_off else "hashing"

    @property
    def reason(self) -> str:
        """Why it is off or unusable."""
        return self._outage.reason

    def ask(self, question: Question[Any], seconds: float = PATIENCE_SECONDS, *, is_patient: bool = False) -> bool:
        """Ask *question*, or ask again for its answer; whether that is there, within *seconds*.

        Args:
            is_patient: wait even where the tier does not keep up.
        """
        with self._changed:
            if question.answered_at is None and self._tier is not None:
                if question.asked_at is None:
                    question.asked_at = time.monotonic()
                    self._work.append(question)
                    self._changed.notify_all()
                if is_patient or not self._is_behind:
                    self._changed.wait_for(lambda: question.answered_at or self._tier is None, seconds)
                self._is_behind = self._is_behind or not question.answered_at
            if question.answered_at is not None:
                if question in self._answered:
                    self._answered.remove(question)
                return True
            is_late = question.asked_at is not None and time.monotonic() - question.asked_at > ANSWER_SECONDS
            tier = self._tier
        if is_late and tier is not None:
            self.failed(TimeoutError(f"its index has not answered for {ANSWER_SECONDS:.0f} s"), tier)
        return False

    def post(self, action: Callable[[Tier], None]) -> bool:
        """Have *action* done with the tier, in its turn; nothing, and False, while there is none."""
        with self._changed:
            if self._tier is None:
                return False
            self._work.append(action)
            self._changed.notify_all()
            return True

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Tier | None]:
        """The tier, for another thread; an error of it inside is passed on, and it is off from then on."""
        with self._changed:
            tier = self._tier
            self._num_lent += 1
        try:
            yield tier
        except STORE_ERRORS as error:
            if tier is not None:
                self.failed(error, tier)
            raise
        finally:
            with self._changed:
                self._num_lent -= 1
                self._changed.notify_all()

    def failed(self, error: Exception, tier: Tier | None) -> None:
        """*tier* (``None``: the attempt to open one) is not to be asked any more."""
        with self._changed:
            if tier is not None and self._tier is not tier:
                return  # somebody else has noticed
            now = time.monotonic()
            is_replaced = isinstance(error, IndexReplaced) and now - self._opened_at > CALM_SECONDS
            if tier is not None:
                self._retired.append(tier)
            self._tier = None
            self._is_behind = False
            self._forget_work()
            reason = explain(error)
            is_news = not is_replaced and self._outage.failed(now, reason)
            self._is_off = not is_replaced
            self._changed.notify_all()
        if is_news:
            logger.warning("no KV store: %s; answers go on without it, and it is tried again now and then", reason)
        elif is_replaced:
            logger.info("the KV store is opened anew: %s", reason)
        if tier is not None:
            self._on_change()

    def give_up(self, reason: str) -> None:
        """There is nothing to store or to find any more."""
        logger.warning("%s: nothing is stored from here on", reason)
        with self._changed:
            self._is_unusable = True
            self._outage.failed(time.monotonic(), reason)
            if self._tier is not None:
                self._retired.append(self._tier)
            self._tier = None
            self._forget_work()
            self._changed.notify_all()
        self._on_change()

    def settle(self, seconds: float = ANSWER_SECONDS) -> None:
        """Wait until what was posted so far is done, or *seconds* are over."""
        self.ask(Question(lambda tier: None), seconds, is_patient=True)

    def close(self) -> None:
        """Do what was posted, close the tier, end the thread. Idempotent; never raises."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _forget_work(self) -> None:
        for item in self._work:
            if isinstance(item, Question):
                item.asked_at = None
        self._work.clear()
        self._answered.clear()

    def _serve(self) -> None:
        while self._wait():
            if self._tier is None:
                self._close_retired()
                self._open()
            elif self._work:
                self._do(self._tier, self._work.popleft())
            self._undo_unwanted()
        with self._changed:
            if self._tier is not None:
                self._retired.append(self._tier)
            self._tier = None
        self._close_retired()

    def _wait(self) -> bool:
        """Return when there is something to do; False: no more."""
        with self._changed:
            while True:
                if self._tier is not None:
                    if self._work:
                        return True
                    if self._is_closing:
                        return False
                    seconds = UNWANTED_SECONDS if self._answered else None
                elif self._is_closing:
                    return False
                elif self._is_unusable:
                    if self._retired:
                        return True
                    seconds = None
                else:
                    seconds = self._outage.seconds_left(time.monotonic()) if self._is_off else 0.0
                    if seconds <= 0:
                        return True
                if not self._changed.wait(seconds) and self._answered:
                    return True

    def _open(self) -> None:
        if self._is_unusable:
            return
        try:
            tier = self._open_tier(lambda: self._is_closing)
        except Exception as error:  # noqa: BLE001  # whatever it is, the engine answers without the store
            self.failed(error, None)
            return
        if tier is None:
            if not self._is_closing:
                self.give_up("the model's files were changed while in use")
            return
        with self._changed:
            self._tier, self._is_off, self._opened_at = tier, False, time.monotonic()
            self._changed.notify_all()
        if self._outage.reason:
            logger.info("the KV store is there again")
        self._on_change()

    def _do(self, tier: Tier, item: Callable[[Tier], None] | Question[Any]) -> None:
        try:
            answer = item.put(tier) if isinstance(item, Question) else item(tier)
        except Exception as error:  # noqa: BLE001  # callers see none of them
            if isinstance(item, Question):
                item.asked_at = None
            self.failed(error, tier)
            return
        if isinstance(item, Question):
            with self._changed:
                item.answer, item.answered_at = answer, time.monotonic()
                self._is_behind = False
                if item.undo is not None:
                    self._answered.append(item)
                self._changed.notify_all()

    def _undo_unwanted(self) -> None:
        """What was claimed for somebody who did not come back is not going to be computed."""
        with self._changed:
            now, tier = time.monotonic(), self._tier
            unwanted = [q for q in self._answered if now - (q.answered_at or now) > UNWANTED_SECONDS]
            self._answered = [q for q in self._answered if q not in unwanted]
        for question in unwanted:
            if tier is not None and question.undo is not None:
                undo, answer = question.undo, question.answer
                self._do(tier, lambda tier, undo=undo, answer=answer: undo(tier, answer))

    def _close_retired(self) -> None:
        with self._changed:
            while self._num_lent:
                self._changed.wait()
            retired, self._retired = self._retired, []
        for tier in retired:
            try:
                tier.close()
            except Exception as error:  # noqa: BLE001  # it is gone anyway
                logger.info("the KV store was not closed properly: %s", error)
