"""The engine's one thread: schedule, run and commit (:mod:`layerstream.step`), sample, deliver.

Callers on any thread put answers into the inbox and wait on their requests; everything else here belongs to the
engine's thread. Invariants: an answer is in the inbox, or the scheduler knows its sequence, or its request is done;
a sweep that fails ends the requests it carried, with the cause, and the engine serves the next; one that only missed a
stored page is run again without it; after ``close`` returns, no thread is left and every request is done.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from layerstream.answer import Answer
from layerstream.beams import BeamAnswer
from layerstream.draft import DraftTree
from layerstream.errors import DeviceLost, EngineClosed, GrammarError
from layerstream.events import EngineIdle, Event, Listener, SweepFinished, SweepStarted, UnitFinished
from layerstream.inbox import Inbox
from layerstream.model.placed import ModelWeights
from layerstream.request import Request
from layerstream.scheduling.drafting.trees import TreeDrafting
from layerstream.scheduling.sampler import sample
from layerstream.scheduling.scheduler import Scheduler
from layerstream.scheduling.verify import verify
from layerstream.sequence import Sequence
from layerstream.step import SweepStep
from layerstream.streaming.device import Device
from layerstream.sweep import Sweep, SweepFailed

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02  # between looks at what another process is computing
MOMENT_SHARE = 0.01  # of a sweep: how long an idle engine waits for others after the first arrival
MOST_MOMENT_SECONDS = 0.02


@dataclass(slots=True)
class LoopCounters:
    """What the loop did so far."""

    sweeps: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    prefix_hits: int = 0
    reused_tokens: int = 0
    sweep_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0


@dataclass(frozen=True, slots=True)
class OpenGang:
    """Requests that wait for each other; ``leave()``: one of them is not going to come, do not wait for it."""

    leave: Callable[[], None]


class EngineLoop:
    """Runs sweeps as long as there is something to run."""

    def __init__(
        self,
        scheduler: Scheduler,
        step: SweepStep,
        drafting: TreeDrafting,
        weights: ModelWeights,
        listener: Listener | None,
        devices: Seq[Device] = (),
    ) -> None:
        self.counters = LoopCounters()
        self._scheduler = scheduler
        self._sweep_step = step
        self._drafting = drafting
        self._weights = weights
        self._listener = listener
        self._devices = devices
        self._lost: DeviceLost | None = None
        self._changed = threading.Condition()
        self._inbox = Inbox(self._moment)
        self._cancelled: set[Request] = set()
        self._answers: dict[Sequence, Answer] = {}
        self._is_closing = False
        self._unit = 0
        self._unit_bytes = 0
        weights.tell(self._unit_done)
        self._thread = threading.Thread(target=self._run, name="layerstream-engine", daemon=True)
        self._thread.start()

    def submit(self, answers: Seq[Answer]) -> None:
        """Let *answers* join at the next sweep, all of them at the same one."""
        with self._changed:
            if self._is_closing:
                raise self._lost or EngineClosed("the engine is closed; make a new LayerStream")
            self._inbox.put(answers, len({answer.request for answer in answers}))
            self._changed.notify_all()

    @contextlib.contextmanager
    def gang(self, size: int, seconds: float) -> Iterator[OpenGang]:
        """Hold what arrives until *size* requests are there, or *seconds* are over."""
        with self._changed:
            gang = self._inbox.open_gang(size, seconds)

        def leave() -> None:
            with self._changed:
                self._inbox.leave_gang(gang)
                self._changed.notify_all()

        try:
            yield OpenGang(leave)
        finally:
            with self._changed:
                self._inbox.close_gang(gang)
                self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Drop *request* by the next sweep."""
        with self._changed:
            self._cancelled.add(request)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop by the next unit, fail what is left, join the thread. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._weights.streamer is not None:
            self._weights.streamer.interrupt(_closed())
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except EngineClosed:
            pass
        except BaseException:
            logger.exception("the engine's thread died")
            raise
        finally:
            self._shut_down()

    def _step(self) -> None:
        sweep = self._scheduler.schedule(self._drafting)
        failed = self._scheduler.take_failed()
        for sequence, error in failed:
            self._drop(self._answers[sequence]).request.fail(error)
        if failed:
            return  # the sweep may have been theirs
        if sweep is None:  # all that is left waits for another process
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or len(self._inbox) or self._cancelled, POLL_SECONDS)
            return
        started, streamed = self._begin(sweep)
        try:
            logits = self._sweep_step.run(sweep)
        except EngineClosed:
            raise
        except SweepFailed as failed:
            self._fail(failed.sequences, failed.error)
            return
        except Exception as error:  # whatever a sweep dies of, only its own requests die with it
            if any(device.is_lost(error) for device in self._devices):
                self._lost = _lost(error)
                raise EngineClosed("the device is lost") from error
            self._fail({span.sequence for _, span in sweep.spans()}, error)
            return
        if logits is None:
            return
        streamed = self._streamed_bytes() - streamed
        seconds = time.perf_counter() - started
        self._count(sweep, seconds, streamed)
        tokens_out, searching = 0, set[BeamAnswer]()
        for sequence, rows in sweep.logit_rows():
            answer = self._answers[sequence]
            if isinstance(answer, BeamAnswer):
                answer.collect(sequence, logits[rows.start])
                searching.add(answer)
            else:
                tokens_out += self._continue(answer, sweep.drafts.get(sequence), logits[rows])
        tokens_out += sum(map(self._search, searching))  # last: beams that fork may take the memory of others
        self._emit(SweepFinished(self.counters.sweeps - 1, seconds, tokens_out, streamed))

    def _wait_for_work(self) -> bool:
        """Take arrivals in, drop the cancelled and the expired; wait while there is nothing to do. False: closing."""
        with self._changed:
            while not self._is_closing:
                arrived, seconds = self._inbox.take(is_idle=not self._answers)
                for answer in arrived:
                    self._take_in(answer)
                self._drop_unwanted()
                if self._answers:
                    return True
                if not len(self._inbox):
                    self._emit(EngineIdle())
                self._changed.wait(seconds)
            return False

    def _drop_unwanted(self) -> None:
        """Whoever was cancelled, or has run out of time, leaves."""
        now = time.perf_counter()
        self._leave(lambda answer: answer.is_expired(now), lambda answer: answer.request.fail(answer.timed_out()))
        cancelled, self._cancelled = self._cancelled, set()
        self._leave(lambda answer: answer.request in cancelled, Answer.cancel)

    def _leave(self, goes: Callable[[Answer], bool], tell: Callable[[Answer], None]) -> None:
        for answer in self._all_answers():
            if goes(answer):
                tell(self._drop(answer))
        for answer in self._inbox.remove(goes):
            tell(answer)

    def _moment(self) -> float:
        """What an idle engine waits for others after the first arrival."""
        counters = self.counters
        return min(MOST_MOMENT_SECONDS, MOMENT_SHARE * counters.sweep_seconds / max(1, counters.sweeps))

    def _take_in(self, answer: Answer) -> None:
        """Let *answer* wait for its first sweep, with the tokens that its grammar begins with; they may be all."""
        self._answers[answer.sequence] = answer
        self._scheduler.add(answer.sequence)
        try:
            self.counters.forced_tokens += len(answer.force())
        except GrammarError as error:
            self._drop(answer).request.fail(error)
            return
        if answer.is_over:
            answer.deliver()
            self._drop(answer)

    def _begin(self, sweep: Sweep) -> tuple[float, int]:
        self._unit = self._unit_bytes = 0
        num_sequences = len({span.sequence for _, span in sweep.spans()})
        planned = self._weights.plan
        self._emit(
            SweepStarted(
                self.counters.sweeps, len(planned.units), sweep.num_tokens, num_sequences, planned.streamed_bytes
            )
        )
        return time.perf_counter(), self._streamed_bytes()

    def _count(self, sweep: Sweep, seconds: float, streamed_bytes: int) -> None:
        """A sweep was computed: note it before anybody hears of its tokens."""
        self.counters.sweeps += 1
        self.counters.sweep_seconds += seconds
        self.counters.tokens_in += sweep.num_tokens
        for sequence in sweep.sampled:
            if self._answers[sequence].is_new:
                self.counters.prefix_hits += sequence.num_cached > 0
                self.counters.reused_tokens += sequence.num_cached
        for answer in {self._answers[span.sequence] for _, span in sweep.spans()}:
            answer.took_part(streamed_bytes)

    def _continue(self, answer: Answer, tree: DraftTree | None, logits: torch.Tensor) -> int:
        """Draw how *answer* goes on, as far as its draft was right; an error in it is its own.

        Args:
            logits: ``(1 + nodes, vocabulary)``.

        Returns:
            Tokens that were drawn.
        """
        sequence, forced = answer.sequence, answer.num_forced
        before = sequence.num_tokens

        def draw(node: int) -> tuple[list[int], bool]:
            token = sample(logits[node + 1], sequence)
            answer.accept(token)
            return [token.token_id, *answer.force()], not answer.is_over

        try:
            right = verify(tree, draw)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other requests go on
            self._drop(answer).request.fail(error)
            return 0
        if tree is not None:
            self._drafting.learn(sequence, tree, right, sequence.token_ids[before:])
            answer.verified(len(tree), len(right))
            self.counters.drafted_tokens += len(tree)
            self.counters.accepted_tokens += len(right)
        self.counters.tokens_out += sequence.num_tokens - before
        self.counters.forced_tokens += answer.num_forced - forced
        if answer.deliver():
            self._drafting.finish(sequence)
            self._drop(answer)
        else:
            self._sweep_step.accept(sequence, right)
        return sequence.num_tokens - before

    def _search(self, answer: BeamAnswer) -> int:
        """All beams of *answer* have logits: choose the next ones; tokens that came out of it."""

        def fork(parent: Sequence, child: Sequence) -> None:
            self._sweep_step.fork(parent, child)
            self._answers[child] = answer

        try:
            gone = answer.advance(fork)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other requests go on
            self._drop(answer).request.fail(error)
            return 0
        for beam in gone:
            self._forget(beam)
        self.counters.tokens_out += 1
        if answer.deliver():
            self._drop(answer)
        return 1

    def _fail(self, carried: Set[Sequence], error: BaseException) -> None:
        """The sweep failed for the sequences *carried*."""
        logger.error("sweep %d failed: %s", self.counters.sweeps, error)
        failed = {self._answers[sequence].request for sequence in carried}
        for answer in self._all_answers():
            if answer.request in failed:
                self._drop(answer).request.fail(error)

    def _all_answers(self) -> list[Answer]:
        return list(dict.fromkeys(self._answers.values()))

    def _drop(self, answer: Answer) -> Answer:
        """*answer* needs no sweep any more."""
        for sequence in [sequence for sequence, other in self._answers.items() if other is answer]:
            self._forget(sequence)
        return answer

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._drafting.forget(sequence)
        del self._answers[sequence]

    def _shut_down(self) -> None:
        with self._changed:
            self._is_closing = True
            left = [*self._all_answers(), *self._inbox.drain()]
            self._answers.clear()
        if self._weights.streamer is not None:
            with contextlib.suppress(*([Exception] if self._lost else [])):
                self._weights.streamer.abort()
        for answer in left:
            answer.request.fail(self._lost or _closed())

    def _unit_done(self, num_bytes: int) -> None:
        if self._is_closing:
            raise _closed()
        self._unit += 1
        self._unit_bytes += num_bytes
        self._emit(UnitFinished(self._unit - 1, len(self._weights.plan.units), self._unit_bytes))

    def _streamed_bytes(self) -> int:
        return 0 if self._weights.streamer is None else self._weights.streamer.streamed_bytes

    def _emit(self, event: Event) -> None:
        if self._listener is not None:
            self._listener(event)


def _lost(error: Exception) -> DeviceLost:
    lost = DeviceLost(
        f"the accelerator failed and will not compute again in this process: {error}; what the KV store has is kept: "
        "start a new process, and look at the driver's log (dmesg, nvidia-smi) if it happens again"
    )
    lost.__cause__ = error
    return lost


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed before the answer was complete")
