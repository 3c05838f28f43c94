"""The engine's one thread: schedule, compute and commit (:mod:`layerstream.runtime.step`), sample, deliver.

Callers on any thread leave answers at the reception (:mod:`layerstream.runtime.reception`) and wait on their requests;
everything else belongs to the engine's thread. Invariants: an answer is at the reception, or the loop has it, or its
request is done; whose sequences the scheduler knows, the loop has; a sweep that only missed a stored page is run again
without it; after ``close`` returns, on any other thread, no thread of the engine is left and every request is done.

Whose an error is, :mod:`layerstream.runtime.blame` decides, for all errors, and :meth:`EngineLoop._judge` acts on it:

* what is one request's own, from taking it in to telling it, ends that request with the cause;
* a sweep ends the requests that it carried, or those whose rows were at fault;
* guesses end nobody: there are none any more. A store that fails is off, a listener that raises is not called again,
  callbacks are logged: they see to that themselves, so none of their errors arrives here;
* an error in the books that all share (who waits, whose pages) ends all requests that were taken in, and the books
  begin anew, for those at the reception and later ones. What cannot be begun anew, or an accelerator that is lost,
  ends the engine: everybody gets the reason, later callers too.

What is wrong with arguments is none of this: it is said where they enter, on the caller's thread. No lock is held while
anything of a caller's is called.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from layerstream.api.events import EngineIdle, Event, SweepFinished, SweepStarted, UnitFinished
from layerstream.api.request import Request
from layerstream.core.draft import DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep, SweepFailed
from layerstream.model.model_weights import ModelWeights
from layerstream.runtime.answer import Answer
from layerstream.runtime.beams import BeamAnswer
from layerstream.runtime.blame import Doing, Victims, blame, ended, lost
from layerstream.runtime.clients import ClientCounters
from layerstream.runtime.guard import Shadow, Shadows
from layerstream.runtime.guesses import Guesses
from layerstream.runtime.idle_work import IdleWork
from layerstream.runtime.inbox import Inbox
from layerstream.runtime.reading import ReadAnswer
from layerstream.runtime.reception import Outside, Reception
from layerstream.runtime.roster import Roster
from layerstream.runtime.step import SweepStep
from layerstream.runtime.steward import Steward
from layerstream.scheduling.advice import Advisor
from layerstream.scheduling.drafting.trees import TreeDrafting
from layerstream.scheduling.sampler import sample
from layerstream.scheduling.verify import verify

logger = logging.getLogger(__name__)

COMPARE_SECONDS = 0.2  # between looks whether a blended answer may be compared
POLL_SECONDS = 0.02  # between looks at what another process is computing
MOMENT_SHARE = 0.01  # of a sweep: how long an idle engine waits for others after the first arrival
MOST_MOMENT_SECONDS = 0.02
MOST_REST_SECONDS = 2.0


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
    blended_tokens: int = 0
    advice: str = ""


class _BooksBroken(Exception):
    """A sequence could not be taken out of the books: whoever it was for, they are everybody's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Ending(Exception):
    """The engine ends: its thread has nothing more to do but to put things away."""


class EngineLoop:
    """Runs sweeps as long as there is something to run."""

    def __init__(
        self, steward: Steward, step: SweepStep, drafting: TreeDrafting, weights: ModelWeights, outside: Outside
    ) -> None:
        self.counters = LoopCounters()
        self.clients = ClientCounters()
        self._steward = steward
        self._scheduler = steward.scheduler
        self._sweep_step = step
        self._guesses = Guesses(drafting, lambda error: self._judge(Doing.GUESSES, error))
        self._weights = weights
        self._outside = outside
        self.reception = Reception(outside.home, Inbox(self._moment, outside.max_queued), IdleWork(self._rest))
        self._here = Roster()
        self._advisor = Advisor(steward.scheduler.pool.page_tokens)
        self._answers: dict[Sequence, Answer] = {}
        self._sequences: dict[Answer, list[Sequence]] = {}
        self._shadows: Shadows | None = None
        self._is_idle = True
        self._unit = 0
        self._unit_bytes = 0
        weights.tell(self._unit_done)
        self._thread = threading.Thread(target=self._run, name="layerstream-engine", daemon=True)
        self._thread.start()

    def submit(self, answers: Seq[Answer]) -> None:
        """Let *answers* join at the next sweep; raises as :meth:`Reception.submit`."""
        self.reception.submit(answers, self._scheduler.num_waiting)

    def compare(self, shadows: Shadows) -> None:
        """Have blended answers compared with exact ones by *shadows*, before anything is submitted."""
        self._shadows = shadows

    def submit_if_idle(self, answers: Seq[Answer]) -> bool:
        """Let *answers* join while nobody asks; raises as :meth:`Reception.submit`."""
        return self.reception.submit_if_idle(answers)

    def close(self) -> None:
        """Stop by the next unit, fail what is left, end the thread and what it used. Never raises. Idempotent.

        On the engine's own thread, in a callback, all of it happens when the callback has returned. A forked child has
        nothing to close.
        """
        if not self._outside.home.is_here:
            return
        self.reception.close()
        if self._weights.streamer is not None:
            with contextlib.suppress(Exception):  # then the sweep ends after the unit
                self._weights.streamer.interrupt(self.reception.reason())
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        self._outside.home.move_in()
        try:
            while not self.reception.is_closing:
                try:
                    if self._wait_for_work():
                        self._step()
                except BaseException as error:  # noqa: BLE001  # the rule is in blame.py
                    with contextlib.suppress(_Ending):
                        self._judge(Doing.BOOKS, error.error if isinstance(error, _BooksBroken) else error)
        finally:
            self._shut_down()

    def _judge(self, doing: Doing, error: BaseException, requests: Iterable[Request] = ()) -> None:
        """*error* was met while *doing* something, for *requests* if it was for some: whoever it belongs to ends.

        Raises:
            _Ending: the engine ends.
        """
        is_lost = self._sweep_step.is_lost(error)
        match blame(doing, is_device_lost=is_lost, is_ending=self.reception.is_closing):
            case Victims.REQUESTS:
                for request in requests:
                    self._fail(request, error)
            case Victims.ALL_REQUESTS:
                logger.error("all requests that were taken in fail: %s", error, exc_info=error)
                try:
                    self._start_over(error)
                except BaseException as worse:  # noqa: BLE001
                    self._judge(Doing.NEW_BOOKS, worse)
            case Victims.ENGINE:
                if not self.reception.is_closing:
                    logger.error("the engine ends: %s", error, exc_info=error)
                    self.reception.close(lost(error) if is_lost else ended(error))
                raise _Ending from error
            case Victims.NOBODY:
                pass

    def _start_over(self, error: BaseException) -> None:
        """Forget whatever was taken in, and begin with empty books."""
        sequences, self._answers, self._sequences = list(self._answers), {}, {}
        requests = dict.fromkeys(answer.request for answer in self._here.drain())
        try:
            for sequence in sequences:
                self._guesses.forget(sequence)
            self._steward.reset()
        finally:
            for request in requests:
                request.fail(error)

    def _step(self) -> None:
        sweep = self._steward.schedule(self._guesses)
        failed = self._scheduler.take_failed()
        for sequence, error in failed:
            if (answer := self._answers.get(sequence)) is not None:
                self._judge(Doing.REQUEST, error, [answer.request])
        if failed:
            return  # the sweep may have been theirs
        if sweep is None:  # all that is left waits for another process
            self.reception.wait(POLL_SECONDS)
            return
        started, streamed = self._begin(sweep)
        logits = self._compute(sweep)
        if logits is None:
            return
        self._sweep_step.commit(sweep)
        streamed = self._streamed_bytes() - streamed
        seconds = time.perf_counter() - started
        self._count(sweep, seconds, streamed)
        self._let_passages_go(sweep)
        tokens_out = self._draw(sweep, logits)
        self._emit(SweepFinished(self.counters.sweeps - 1, seconds, tokens_out, streamed))

    def _compute(self, sweep: Sweep) -> torch.Tensor | None:
        """The logits of *sweep*; ``None`` if it had no effect."""
        try:
            return self._sweep_step.compute(sweep)
        except BaseException as error:  # noqa: BLE001  # whatever it dies of
            cause = error.error if isinstance(error, SweepFailed) else error
            carried = (
                error.sequences if isinstance(error, SweepFailed) else {span.sequence for _, span in sweep.spans()}
            )
            if not self.reception.is_closing:
                logger.error("sweep %d failed: %s", self.counters.sweeps, cause)
            self._judge(Doing.SWEEP, cause, {self._answers[sequence].request for sequence in carried})
            return None

    def _let_passages_go(self, sweep: Sweep) -> None:
        """Passages whose context is computed are in pages that others may share by now; their sequences are over."""
        for sequence in {span.sequence for _, span in sweep.known_spans() if span.sequence.is_passage}:
            if sequence.is_prefilled:
                self._sequences[self._answers[sequence]].remove(sequence)
                self._forget(sequence)

    def _draw(self, sweep: Sweep, logits: torch.Tensor) -> int:
        """Every sampled sequence goes on; tokens that came out of it."""
        tokens_out, searching = 0, dict[BeamAnswer, None]()
        for sequence, rows in sweep.logit_rows():
            answer = self._answers.get(sequence)  # its request may have failed with another of its answers
            if answer is None:
                continue
            with self._for_request(answer.request):
                if isinstance(answer, BeamAnswer):
                    answer.collect(sequence, logits[rows.start])
                    searching[answer] = None
                elif isinstance(answer, ReadAnswer):
                    answer.see_logits(logits[rows.start])
                    self._deliver_read(answer)
                else:
                    tokens_out += self._continue(answer, sweep.drafts.get(sequence), logits[rows])
        for span, total in self._sweep_step.take_read():
            answer = self._answers.get(span.sequence)
            if isinstance(answer, ReadAnswer):
                with self._for_request(answer.request):
                    answer.see_hidden(span, total)
                    self._deliver_read(answer)
        for answer in searching:  # last: beams that fork may take the memory of others
            with self._for_request(answer.request):
                tokens_out += self._search(answer)
        return tokens_out

    def _deliver_read(self, answer: ReadAnswer) -> None:
        if answer.is_over:
            self._drop(answer)
        answer.deliver()

    @contextlib.contextmanager
    def _for_request(self, request: Request) -> Iterator[None]:
        """What is done within is *request*'s own, and so is an error in it."""
        try:
            yield
        except _BooksBroken:
            raise
        except BaseException as error:  # noqa: BLE001
            self._judge(Doing.REQUEST, error, [request])

    def _wait_for_work(self) -> bool:
        """Take arrivals in, drop the cancelled and the expired. False: there is nothing to do yet; it was waited."""
        arrivals = self.reception.take(is_idle=not len(self._here))
        for answer in (*arrivals.answers, *arrivals.unwanted):
            self._here.add(answer)
        self._drop_unwanted(arrivals.cancelled)
        for answer in arrivals.answers:
            if answer in self._here:
                self._take_in(answer)
        if len(self._here):
            self._is_idle = False
            return True
        if not self._is_idle and self.reception.is_empty:
            self._is_idle = True
            self._emit(EngineIdle())
        is_to_compare = self._shadows is not None and self._shadows.begin(self.reception.submit_if_idle)
        self.reception.wait(COMPARE_SECONDS if is_to_compare and arrivals.seconds is None else arrivals.seconds)
        return False

    def _drop_unwanted(self, cancelled: Iterable[Request]) -> None:
        """Whoever was cancelled, or has run out of time, leaves."""
        for answer in self._here.expired(time.perf_counter()):
            self._fail(answer.request, answer.timed_out())
        for request in cancelled:
            for answer in self._here.of(request):
                with self._for_request(request):
                    self._drop(answer)
                    answer.cancel()

    def _moment(self) -> float:
        """What an idle engine waits for others after the first arrival."""
        counters = self.counters
        return min(MOST_MOMENT_SECONDS, MOMENT_SHARE * counters.sweep_seconds / max(1, counters.sweeps))

    def _rest(self) -> float:
        """How long idle work waits after a question: who was just answered may ask again."""
        return min(MOST_REST_SECONDS, self.counters.sweep_seconds / max(1, self.counters.sweeps))

    def _take_in(self, answer: Answer) -> None:
        """Let *answer* wait for its first sweep, with the tokens that its grammar begins with; they may be all."""
        with self._for_request(answer.request):
            for sequence in (*answer.contexts, answer.sequence):
                self._own(sequence, answer)
                self._scheduler.add(sequence)
            self.counters.forced_tokens += len(answer.force())
            if answer.is_over:
                self._drop(answer)
                answer.deliver()

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
        for sequence in sweep.ended:
            if self._answers[sequence].is_new and not isinstance(self._answers[sequence], Shadow):
                self.counters.blended_tokens += sequence.num_blended
                self.counters.prefix_hits += sequence.tenancy.num_cached > 0
                self.counters.reused_tokens += sequence.tenancy.num_cached
                self._look_at(sequence)
        for answer in {self._answers[span.sequence] for _, span in sweep.spans()}:
            answer.took_part(streamed_bytes)

    def _look_at(self, sequence: Sequence) -> None:
        """A prompt was computed: whether there is something to say about how prompts are put together."""
        if sequence.params.max_tokens == 1:  # warmed, not asked
            return
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        num_reused = min(len(prompt), sequence.tenancy.num_cached + sequence.tenancy.num_blended)
        try:
            advice = self._advisor.note(prompt, num_reused, sequence.tenant)
        except Exception:  # it is nobody's request
            logger.exception("how prompts are put together could not be looked at")
            return
        if advice is not None:
            self.counters.advice = str(advice)
            logger.warning("%s", advice)

    def _continue(self, answer: Answer, tree: DraftTree | None, logits: torch.Tensor) -> int:
        """Draw how *answer* goes on, as far as its draft was right.

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

        right = verify(tree, draw)
        if tree is not None:
            self._guesses.learn(sequence, tree, right, sequence.token_ids[before:])
            answer.verified(len(tree), len(right))
            self.counters.drafted_tokens += len(tree)
            self.counters.accepted_tokens += len(right)
        self.counters.tokens_out += sequence.num_tokens - before
        self.counters.forced_tokens += answer.num_forced - forced
        if answer.is_over:
            if not isinstance(answer, Shadow):
                self._guesses.finish(sequence)
            self._drop(answer)
            if self._shadows is not None and not isinstance(answer, Shadow):
                self._shadows.ended(answer)
        else:
            self._sweep_step.accept(sequence, right)
        answer.deliver()
        return sequence.num_tokens - before

    def _search(self, answer: BeamAnswer) -> int:
        """All beams of *answer* have logits: choose the next ones; tokens that came out of it."""

        def fork(parent: Sequence, child: Sequence) -> None:
            self._own(child, answer)
            self._sweep_step.fork(parent, child)

        gone = answer.advance(fork)
        for beam in gone:
            self._sequences[answer].remove(beam)
            self._forget(beam)
        self.counters.tokens_out += 1
        if answer.is_over:
            self._drop(answer)
        answer.deliver()
        return 1

    def _own(self, sequence: Sequence, answer: Answer) -> None:
        self._answers[sequence] = answer
        self._sequences.setdefault(answer, []).append(sequence)

    def _fail(self, request: Request, error: BaseException) -> None:
        """*request* ends with *error*; none of its answers needs a sweep any more."""
        try:
            for answer in self._here.of(request):
                self._drop(answer)
        finally:
            request.fail(error)

    def _drop(self, answer: Answer) -> None:
        """*answer* needs no sweep any more."""
        for sequence in self._sequences.pop(answer, []):
            self._forget(sequence)
        if answer in self._here:
            self._here.remove(answer)
            if not isinstance(answer, Shadow):
                self.clients.count(answer, time.perf_counter())
            elif self._shadows is not None:
                self._shadows.gone(answer)

    def _forget(self, sequence: Sequence) -> None:
        del self._answers[sequence]
        self._guesses.forget(sequence)
        try:
            self._steward.remove(sequence)
        except Exception as error:
            raise _BooksBroken(error) from error

    def _shut_down(self) -> None:
        """Tell everybody that it is over, then close what this thread used."""
        self.reception.close()
        left = [*self._here.drain(), *self.reception.drain()]
        self._answers.clear()
        self._sequences.clear()
        for request in dict.fromkeys(answer.request for answer in left):
            request.fail(self.reception.reason())
        if self._weights.streamer is not None:
            with contextlib.suppress(Exception):  # it is closed next, which says what is wrong with it
                self._weights.streamer.abort()
        self._outside.at_end()

    def _unit_done(self, num_bytes: int) -> None:
        if self.reception.is_closing:
            raise self.reception.reason()
        self._unit += 1
        self._unit_bytes += num_bytes
        self._emit(UnitFinished(self._unit - 1, len(self._weights.plan.units), self._unit_bytes))

    def _streamed_bytes(self) -> int:
        return 0 if self._weights.streamer is None else self._weights.streamer.streamed_bytes

    def _emit(self, event: Event) -> None:
        if self._outside.listener is not None:
            self._outside.listener(event)
