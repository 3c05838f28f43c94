"""What was done for whom: numbers for each client, of answers that are over. One thread counts, any thread reads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from layerstream.runtime.answer import Answer

MOST_CLIENTS = 1024  # those heard of least recently are forgotten


@dataclass(slots=True)
class ClientStats:
    """What one client had so far.

    Attributes:
        requests: prompts, whatever became of them.
        prompt_tokens: of those; ``cached_tokens``: of these, those whose KV was there.
        generated_tokens: of all answers.
        waited_seconds: from submission to the first sweep, of all requests together.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    waited_seconds: float = 0.0


class ClientCounters:
    """Counts for at most *most* clients."""

    def __init__(self, most: int = MOST_CLIENTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, ClientStats] = OrderedDict()

    def count(self, answer: Answer, now: float) -> None:
        """*answer* is over, for good or ill; a request counts with its first one."""
        sequence = answer.sequence
        with self._lock:
            found = self._clients.setdefault(sequence.client, ClientStats())
            self._clients.move_to_end(sequence.client)
            while len(self._clients) > self._most:
                self._clients.popitem(last=False)
            found.generated_tokens += sequence.num_output_tokens
            if answer.index:
                return
            found.requests += 1
            found.prompt_tokens += sequence.num_prompt_tokens
            found.cached_tokens += sequence.tenancy.num_cached
            found.waited_seconds += (answer.first_sweep or now) - answer.submitted

    def snapshot(self) -> dict[str, ClientStats]:
        """The numbers as they are now, the client heard of last at the end."""
        with self._lock:
            return {client: replace(found) for client, found in self._clients.items()}
