"""An engine whose answers a test writes, delta by delta, as an engine's thread would."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from layerstream.completion import Completion, CompletionMetrics, Delta, Usage
from layerstream.params import SamplingParams
from layerstream.request import Request

WORDS = ["Tolmund", " Varek", " leads", " it."]


class FakeEngine:
    """Answers every prompt with :data:`WORDS`: at once, or when :meth:`release` is called.

    Attributes:
        batches: the prompts of each ``submit_many``, in order.
        params: the sampling parameters of each.
        cancelled: the requests that were cancelled before they were done.
    """

    model_name = "fake"
    context_length = 512

    def __init__(self, *, holds_back: bool = False, has_chat_template: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self.batches: list[list[Any]] = []
        self.params: list[SamplingParams] = []
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.submitted = threading.Event()
        self.error: Exception | None = None
        self._holds_back = holds_back

    def submit(self, prompt: Any, params: SamplingParams | None = None) -> Request:
        return self.submit_many([prompt], params)[0]

    def submit_many(self, prompts: Sequence[Any], params: SamplingParams | None = None) -> list[Request]:
        self.batches.append(list(prompts))
        self.params.append(params or SamplingParams())
        requests = [Request(1, self.cancelled.append) for _ in prompts]
        self.requests.extend(requests)
        if not self._holds_back:
            for request in requests:
                self.release(request)
        self.submitted.set()
        return requests

    def release(self, request: Request, num_words: int = len(WORDS)) -> None:
        """Let the next *num_words* words of *request* out; the last one brings the completion."""
        if self.error is not None:
            request.fail(self.error)
            return
        already = len(request._deltas)
        for position in range(already, min(already + num_words, len(WORDS))):
            done = self._completion() if position == len(WORDS) - 1 else None
            request.push(Delta(WORDS[position], [position], None if done is None else "stop", 0, done))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    @staticmethod
    def _completion() -> Completion:
        return Completion(
            text="".join(WORDS),
            token_ids=list(range(len(WORDS))),
            finish_reason="stop",
            usage=Usage(prompt_tokens=7, cached_tokens=0, completion_tokens=len(WORDS)),
            metrics=CompletionMetrics(sweeps=4, first_token_seconds=0.1, seconds=0.4, streamed_bytes=0),
        )
