"""Prompts that are read instead of answered: vectors of texts, and what they are likely to go on with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from layerstream import readings
from layerstream.api import arguments
from layerstream.api.reading import HiddenState, Pooling, Reading, TokenLogits
from layerstream.api.request import Request
from layerstream.api.terms import Terms
from layerstream.front.phrasing import Phrasing
from layerstream.text.prompt import Prompt, split_prompts


class Scoring(Phrasing):
    """Reads prompts."""

    def embed(
        self,
        texts: Prompt | Seq[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        on_done: Callable[[int, int], None] | None = None,
        **terms: Any,
    ) -> np.ndarray:
        """Vectors ``(n, hidden)`` of *texts*, fp32: final hidden states, in as few sweeps as there is room for.

        Args:
            texts: as prompts of :meth:`generate`; a text has what the model's tokenizer adds to it.
            pooling: ``"last"``: of the last token; ``"mean"``: the mean over all.
            normalize: each vector of length 1.
            on_done: called with the number of texts done and of all, after each.
            terms: ``keep`` (here ``False`` if not given), ``timeout``, ``priority``, ``client``, ``tenant``: as of
                :meth:`submit_to_read`.
        """
        submit = functools.partial(self.submit_to_read, reading=HiddenState(pooling), **{"keep": False, **terms})
        vectors = readings.read(submit, self._encode_all(texts), on_done, self.max_queued)
        return readings.normalized(vectors, self.plan.facts.hidden_size, is_wanted=normalize)

    def score(
        self,
        prompts: Prompt | Seq[Prompt],
        tokens: Iterable[str | int] = ("yes", "no"),
        *,
        on_done: Callable[[int, int], None] | None = None,
        **terms: Any,
    ) -> np.ndarray:
        """Probabilities ``(n, tokens)`` that each of *prompts* goes on with one of *tokens* rather than with another of
        them; of a single token, the logistic function of its logit.

        Args:
            tokens: texts that are one token each, or token ids.
            on_done, terms: as of :meth:`embed`; ``keep`` is ``True`` if not given.

        Raises:
            ConfigurationError: a text that is several tokens.
        """
        wanted = readings.token_ids_of(tokens, self.encode_piece)
        submit = functools.partial(self.submit_to_read, reading=TokenLogits(wanted), **terms)
        return readings.probabilities(
            readings.read(submit, self._encode_all(prompts), on_done, self.max_queued), len(wanted)
        )

    def submit_to_read(
        self,
        prompts: Seq[Prompt],
        reading: Reading,
        *,
        keep: bool = True,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
    ) -> list[Request]:
        """Hand prompts in to be read instead of answered: what *reading* wants of each is its completion's ``reading``.

        Args:
            reading: :class:`TokenLogits` or :class:`HiddenState`.
            keep: let the store keep their pages. ``False`` for prompts that do not begin as later ones will: they share
                what they have in common while they are in memory, and the disk keeps what it is for.

        Raises:
            As :meth:`submit_many`.
        """
        self._loop.reception.check_open()
        if not isinstance(reading, TokenLogits | HiddenState):
            raise arguments.refusal("reading", reading, "TokenLogits or HiddenState")
        terms = Terms(timeout, priority, client, tenant)
        requests, answers = self._intake.take_to_read(prompts, reading, terms, keep=arguments.flag("keep", keep))
        self._loop.submit(answers)
        return requests

    def _encode_all(self, prompts: Prompt | Seq[Prompt]) -> list[list[int]]:
        """What is wrong with the last of many is said before the first is computed."""
        return [self.encode(prompt) for prompt in split_prompts(prompts)]
