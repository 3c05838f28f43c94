"""An engine whose answers a test writes, delta by delta, as an engine's thread would."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from layerstream.api.completion import Completion, CompletionMetrics, Delta, FinishReason, TokenLogprob, Usage
from layerstream.api.params import SamplingParams
from layerstream.api.request import Request

from tests.chat.families import make_turns

WORDS = ["Tolmund", " Varek", " leads", " it."]


class FakeEngine:
    """Answers every prompt with :data:`WORDS`: at once, or when :meth:`release` is called.

    Attributes:
        batches: the prompts of each ``submit_many``, in order.
        params: the sampling parameters of each.
        cancelled: the requests that were cancelled before they were done.
        gangs: the sizes of the gangs that were opened; left: one of them for each member that left.
        words: what it says.
        reason: why its answers end.
        logprobs: of its tokens.
    """

    model_name = "fake"
    context_length = 512
    reuses_anywhere = False
    identity: Mapping[str, Any] = {"model": "fake"}

    def __init__(self, *, holds_back: bool = False, has_chat_template: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self.batches: list[list[Any]] = []
        self.params: list[SamplingParams] = []
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.submitted = threading.Event()
        self.error: Exception | None = None
        self._holds_back = holds_back
        self.gangs: list[int] = []
        self.left: list[int] = []
        self.words = WORDS
        self.reason: FinishReason = "stop"
        self.logprobs: list[TokenLogprob] | None = None
        self.terms: list[dict[str, Any]] = []
        self._turns, self.tokenizer, _ = make_turns("hermes")

    def submit(self, prompt: Any, params: SamplingParams | None = None, **terms: Any) -> Request:
        return self.submit_many([prompt], params, **terms)[0]

    def submit_many(self, prompts: Sequence[Any], params: SamplingParams | None = None, **terms: Any) -> list[Request]:
        self.terms.append(terms)
        self.batches.append(list(prompts))
        self.params.append(params or SamplingParams())
        requests = [Request(1, self.cancelled.append) for _ in prompts]
        self.requests.extend(requests)
        if not self._holds_back:
            for request in requests:
                self.release(request)
        self.submitted.set()
        return requests

    def release(self, request: Request, num_words: int = 10_000) -> None:
        """Let the next *num_words* words of *request* out; the last one brings the completion."""
        if self.error is not None:
            request.fail(self.error)
            return
        already = len(request._deltas)
        for position in range(already, min(already + num_words, len(self.words))):
            done = self._completion() if position == len(self.words) - 1 else None
            request.push(Delta(self.words[position], [position], None if done is None else self.reason, 0, done))

    def turn(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **options: Any) -> Any:
        options["explain_format"] = options.get("explain_format", False)
        return self._turns.make(messages, params, **options)

    @contextlib.contextmanager
    def gang(self, size: int, timeout: float = 1.0) -> Iterator[Any]:
        self.gangs.append(size)
        yield SimpleNamespace(leave=lambda: self.left.append(size))

    def _completion(self) -> Completion:
        return Completion(
            text="".join(self.words),
            token_ids=list(range(len(self.words))),
            finish_reason=self.reason,
            usage=Usage(prompt_tokens=7, cached_tokens=0, completion_tokens=len(self.words)),
            metrics=CompletionMetrics(sweeps=4, first_token_seconds=0.1, seconds=0.4, streamed_bytes=0),
            logprobs=self.logprobs,
        )
