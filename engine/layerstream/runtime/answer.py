"""An :class:`Answer`: one sequence's tokens on their way to text. Owned by the engine's thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from layerstream.api.completion import Completion, CompletionMetrics, Delta, FinishReason, TokenLogprob, Usage
from layerstream.api.request import Request
from layerstream.core.sequence import Sequence
from layerstream.errors import RequestTimeout
from layerstream.scheduling.sampler import SampledToken
from layerstream.text.detokenizer import Detokenizer
from layerstream.text.stop import StopMatcher


@dataclass(eq=False)
class Answer:
    """What one sequence has said so far.

    Attributes:
        end_token_ids: ids that end it; they are kept as tokens and not shown.
        submitted: ``time.perf_counter()`` at submission.
        deadline: when it is given up, on the same clock.
        contexts: sequences that compute passages of its prompt, for it and for others of its request.
        first_sweep: when the first sweep that carried a row of it was over; ``None``: none was.
    """

    request: Request
    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    stop: StopMatcher
    end_token_ids: frozenset[int]
    submitted: float
    deadline: float = float("inf")
    first_sweep: float | None = None
    num_sweeps: int = 0
    streamed_bytes: int = 0
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token_seconds: float | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_forced: int = 0
    contexts: tuple[Sequence, ...] = ()
    _reason: FinishReason | None = None
    _num_shown: int = 0
    _num_delivered: int = 0

    def took_part(self, streamed_bytes: int) -> None:
        """A sweep carried rows of this sequence."""
        self.num_sweeps += 1
        if self.first_sweep is None:
            self.first_sweep = time.perf_counter()
        self.streamed_bytes += streamed_bytes

    def verified(self, num_drafted: int, num_right: int) -> None:
        """A sweep verified guesses of this sequence."""
        self.num_drafted += num_drafted
        self.num_accepted += num_right

    def accept(self, token: SampledToken) -> FinishReason | None:
        """Append *token* to the sequence, and say whether that was the end; :meth:`deliver` tells the request."""
        self.sequence.token_ids.append(token.token_id)
        if self.sequence.constraint is not None:
            self.sequence.constraint.accept(token.token_id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        fresh, self._reason = self._read(token.token_id)
        self.text += fresh
        return self._reason

    def force(self) -> list[int]:
        """Append what the grammar leaves no choice about; those tokens. (None where log-probabilities are wanted.)"""
        constraint, forced = self.sequence.constraint, []
        if constraint is None or self.sequence.params.logprobs is not None:
            return forced
        while self._reason is None and (tokens := constraint.forced()):
            for token_id in tokens:
                if self._reason is None:
                    self.accept(SampledToken(token_id, None))
                    forced.append(token_id)
        self.num_forced += len(forced)
        return forced

    @property
    def is_new(self) -> bool:
        """Whether nothing was delivered yet."""
        return self.first_token_seconds is None

    @property
    def is_over(self) -> bool:
        """Whether a token was the last one."""
        return self._reason is not None

    def deliver(self) -> bool:
        """Tell the request what came since the last time; whether that was the end."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.submitted
        text, token_ids = self.text[self._num_shown :], self.sequence.output_ids[self._num_delivered :]
        self._num_shown, self._num_delivered = len(self.text), self.sequence.num_output_tokens
        completion = self._complete(self._reason) if self._reason else None
        if token_ids:
            self.request.push(Delta(text, token_ids, self._reason, self.index, completion))
        return completion is not None

    def timed_out(self) -> RequestTimeout:
        """Why it is given up."""
        count = self.sequence.num_output_tokens
        return RequestTimeout(
            f"given up after {self.deadline - self.submitted:g} seconds with {count} of at most "
            f"{self.sequence.params.max_tokens} tokens: allow it more time, or ask for fewer"
        )

    def cancel(self) -> None:
        """End here, at the caller's wish."""
        self.request.push(Delta("", [], "cancelled", self.index, self._complete("cancelled")))

    def _read(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Text that may be shown now, and why the answer ends if it does."""
        if token_id in self.end_token_ids:
            return self._flush(self.detokenizer.finish()), "stop"
        fresh = self.stop.push(self.detokenizer.push(token_id))
        if self.stop.matched is not None:
            return fresh, "stop"
        if self.sequence.constraint is not None and self.sequence.constraint.is_over:
            return fresh + self._flush(self.detokenizer.finish()), "stop"
        if self.sequence.num_tokens >= self.sequence.max_num_tokens:
            fresh += self._flush(self.detokenizer.finish())
            return fresh, "stop" if self.stop.matched is not None else "length"
        return fresh, None

    def _flush(self, rest: str) -> str:
        fresh = self.stop.push(rest)
        return fresh if self.stop.matched is not None else fresh + self.stop.finish()

    def _complete(self, reason: FinishReason) -> Completion:
        now = time.perf_counter() - self.submitted
        sequence = self.sequence
        return Completion(
            text=self.text,
            token_ids=sequence.output_ids,
            finish_reason=reason,
            usage=Usage(
                sequence.num_prompt_tokens,
                sequence.tenancy.num_cached,
                sequence.num_output_tokens,
                sequence.num_blended,
            ),
            metrics=CompletionMetrics(
                sweeps=self.num_sweeps,
                streamed_bytes=self.streamed_bytes,
                first_token_seconds=now if self.first_token_seconds is None else self.first_token_seconds,
                seconds=now,
                loaded_tokens=sequence.tenancy.num_loaded,
                recomputed_tokens=sequence.tenancy.num_declined,
                drafted_tokens=self.num_drafted,
                accepted_tokens=self.num_accepted,
                forced_tokens=self.num_forced,
                tokens_per_sweep=sequence.num_output_tokens / max(1, self.num_sweeps),
            ),
            index=self.index,
            seed=None if sequence.params.is_greedy else sequence.params.seed,
            logprobs=self.logprobs if sequence.params.logprobs is not None else None,
        )
