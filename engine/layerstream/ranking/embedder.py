"""Texts to vectors, queries apart from documents: :class:`Embedder`, as both wrappers use it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerstream import readings
from layerstream.api import arguments
from layerstream.api.apart import apart
from layerstream.api.reading import HiddenState, Pooling
from layerstream.errors import ConfigurationError, PromptTooLong

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

QUERY_FORM = "Instruct: {instruction}\nQuery:{query}"
"""Of Qwen3-Embedding and of others that are told what a query is for."""
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Embedder:
    """Embeds texts with *engine*.

    Args:
        pooling: ``"last"``: the final hidden state of a text's last token; ``"mean"``: the mean over all.
        normalize: vectors of length 1.
        instruction: what queries are for; documents have none. Empty: queries are embedded as documents are.
        query_form: how both are written.
        max_tokens: of a text; ``None``: as many as the context has.
        truncate: leave out the end of a longer text; else that is an error.
        dimensions: keep so many numbers of each vector, for models trained so (Matryoshka); ``None``: all.
        append_eos: put the EOS token behind every text, where the model's tokenizer does not.
    """

    def __init__(
        self,
        engine: LayerStream,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        instruction: str = INSTRUCTION,
        query_form: str = QUERY_FORM,
        max_tokens: int | None = None,
        truncate: bool = False,
        dimensions: int | None = None,
        append_eos: bool = False,
    ) -> None:
        if "{query}" not in query_form:
            raise ConfigurationError(f"query_form has a place for the {{query}}; found {query_form!r:.80}")
        self._engine = engine
        self._reading = HiddenState(pooling)
        self._normalize = normalize
        self._instruction = instruction
        self._query_form = query_form
        most = engine.context_length - 1
        self._most = most if max_tokens is None else min(most, arguments.whole_number("max_tokens", max_tokens, 1))
        self._truncate = truncate
        self._width = engine.plan.facts.hidden_size
        self._dimensions = self._width
        if dimensions is not None:
            self._dimensions = arguments.whole_number("dimensions", dimensions, 1, self._width)
        self._head, self._tail = engine.frame
        eos = engine.tokenizer.eos_token_id
        if append_eos and eos is not None and self._tail[-1:] != [eos]:
            self._tail = [*self._tail, eos]

    def documents(
        self, texts: Iterable[str], *, on_done: Callable[[int, int], None] | None = None, **terms: Any
    ) -> np.ndarray:
        """``(n, dimensions)``, fp32.

        Args:
            terms: ``timeout``, ``priority``, ``client``, ``tenant``, as of ``engine.submit_to_read``.

        Raises:
            PromptTooLong: a text that the context has no room for, and it may not be cut.
            EmptyPrompt: a text without tokens.
        """
        prompts = [self.encode(text) for text in texts]
        return self._vectors(readings.read(self._submit(terms), prompts, on_done, self._engine.max_queued))

    async def adocuments(self, texts: Iterable[str], **terms: Any) -> np.ndarray:
        """As :meth:`documents`, without blocking the event loop."""
        prompts = await apart(lambda: [self.encode(text) for text in texts])
        return self._vectors(await readings.aread(self._submit(terms), prompts, self._engine.max_queued))

    def as_query(self, query: str) -> str:
        """What is embedded of *query*."""
        if not self._instruction:
            return query
        return self._query_form.replace("{instruction}", self._instruction).replace("{query}", query)

    def encode(self, text: str) -> list[int]:
        """The token ids that the model reads of *text*: what the tokenizer adds to it stays, whatever is cut."""
        said = self._engine.encode_piece(text, is_said=True)
        room = self._most - len(self._head) - len(self._tail)
        if len(said) > room and not self._truncate:
            num_tokens = len(self._head) + len(said) + len(self._tail)
            raise PromptTooLong(
                f"a text has {num_tokens} tokens; there is room for {self._most}: split it, or let it be cut with "
                "truncate=True",
                num_tokens=num_tokens,
            )
        ids = [*self._head, *said[:room], *self._tail]
        return self._engine.encode(ids)

    def _submit(self, terms: dict[str, Any]) -> readings.Submit:
        return functools.partial(self._engine.submit_to_read, reading=self._reading, **{"keep": False, **terms})

    def _vectors(self, found: Sequence[np.ndarray]) -> np.ndarray:
        whole = readings.normalized(found, self._width, is_wanted=False)[:, : self._dimensions]
        return readings.normalized(list(whole), self._dimensions, is_wanted=self._normalize)
