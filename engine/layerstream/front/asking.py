"""Prompts that are answered: waited for, streamed, or handed in and read later.

All ways end in the same place: terms and parameters are checked, the intake makes requests and their empty answers, and
the loop takes these. Whoever stops waiting cancels what it waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import replace

from layerstream.api import arguments
from layerstream.api.completion import Completion, Delta
from layerstream.api.params import Params, SamplingParams, as_params
from layerstream.api.request import Request
from layerstream.api.terms import Terms
from layerstream.front.phrasing import Phrasing
from layerstream.runtime.reception import OpenGang
from layerstream.text.prompt import Prompt, split_prompts

GANG_SECONDS = 1.0
MOST_GANG_SECONDS = 3600.0  # everybody waits for a gang


class Asking(Phrasing):
    """Answers prompts."""

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> list[Completion]:
        r"""Complete one prompt or several; several share every sweep.

        Args:
            prompts: text, a list of token ids or a list of chat messages; or a list of those.
            timeout: seconds after which a request that is not finished is given up.
            priority: where requests have to wait, more goes first; waiting raises it.
            client: whom it is for; clients share the engine fairly.
            tenant: whose it is: what one tenant's prompts left in memory and on disk, no other's find. Empty: the
                engine's own (``KVStoreConfig(salt=...)``). It has to come from whoever runs the engine.
            passages: with ``reuse="anywhere"``, texts in the prompts that other prompts have as well, such as retrieved
                documents; beside those that :func:`~layerstream.compose` marked or a retriever of this process found.
                ``None``: nothing is moved.

        Returns:
            ``n`` completions for each prompt, in order.

        Raises:
            PromptError, GrammarError: before anything runs. RequestTimeout: *timeout* is over. Other errors: the cause
                of the first request that failed.
        """
        terms = Terms(timeout, priority, client, tenant, passages)
        requests = self._submit(split_prompts(prompts), as_params(params), terms)
        try:
            return [completion for request in requests for completion in request.completions()]
        except BaseException:  # Ctrl-C, or one of several failed: nobody waits for the rest
            for request in requests:
                request.cancel()
            raise

    def stream(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> Iterator[Delta]:
        """Deltas as the sweeps bring them; leaving the iteration cancels the request."""
        self._loop.reception.check_open()
        terms = Terms(timeout, priority, client, tenant, passages)
        terms = replace(terms, passages=self._intake.passages_in(prompt, terms))  # token ids do not know them
        return self._stream(self.encode(prompt), as_params(params), terms)

    def submit(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> Request:
        """Hand *prompt* in and go on; it joins the next sweep."""
        return self._submit([prompt], as_params(params), Terms(timeout, priority, client, tenant, passages))[0]

    def submit_many(
        self,
        prompts: Seq[Prompt],
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> list[Request]:
        """Hand several prompts in, to join the same sweep. All are checked before any is handed in.

        Raises:
            PromptError, ConfigurationError: what is wrong, and which argument it is. QueueFull: more than may wait.
            EngineClosed: the engine is closed, or another process's.
        """
        return self._submit(prompts, as_params(params), Terms(timeout, priority, client, tenant, passages))

    def gang(self, size: int, timeout: float = GANG_SECONDS) -> AbstractContextManager[OpenGang]:
        """Within it, requests wait for each other: none is begun before *size* of them were submitted, by whatever
        threads, or *timeout* seconds are over. ``leave()`` of what it yields: one of them is not going to come.
        For batches whose members arrive one by one::

            with engine.gang(len(questions)), ThreadPoolExecutor() as pool:
                answers = list(pool.map(chain.invoke, questions))

        Raises:
            ConfigurationError: *size* or *timeout* is out of range: everybody waits for a gang, for an hour at most.
        """
        self._loop.reception.check_open()
        size = arguments.whole_number("size", size, 0)
        return self._loop.reception.gang(size, arguments.number("timeout", timeout, 0.0, MOST_GANG_SECONDS))

    def _stream(self, token_ids: list[int], params: SamplingParams, terms: Terms) -> Iterator[Delta]:
        request = self._submit([token_ids], params, terms)[0]
        try:
            yield from request
        finally:
            if self._home.is_here:
                request.cancel()
