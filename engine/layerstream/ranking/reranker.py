"""Passages in order of their use for a query: :class:`Reranker`, as both wrappers use it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from layerstream import readings
from layerstream.api import arguments
from layerstream.api.apart import apart
from layerstream.api.reading import TokenLogits
from layerstream.errors import ConfigurationError, PromptTooLong
from layerstream.ranking.forms import RerankForm, fill, form_of

Item = TypeVar("Item")

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

_MARK = "\ue000"  # no template says it


class Reranker:
    """Scores passages with *engine*, all of a query in the same sweeps.

    Args:
        form: how prompts are written; ``None``: as the model was trained, by its name.
        instruction: what to look for; ``None``: as the form says.
        max_tokens: of a prompt; ``None``: as many as the context has.
        truncate: leave out the end of a passage that makes it longer; else that is an error.
    """

    def __init__(
        self,
        engine: LayerStream,
        form: RerankForm | None = None,
        *,
        instruction: str | None = None,
        max_tokens: int | None = None,
        truncate: bool = True,
    ) -> None:
        self._engine = engine
        self.form = form or form_of(engine.model_name)
        most = engine.context_length - 1
        self._most = most if max_tokens is None else min(most, arguments.whole_number("max_tokens", max_tokens, 1))
        self._truncate = truncate
        self._instruction = self.form.instruction if instruction is None else instruction
        self._tokens = self._first_tokens()
        self._opening, self._pieces = self._make_pieces()

    def score(
        self, query: str, passages: Iterable[str], *, on_done: Callable[[int, int], None] | None = None, **terms: Any
    ) -> list[float]:
        """Of each of *passages* a number in [0, 1]: more is of more use for *query*.

        Args:
            terms: ``keep``, ``timeout``, ``priority``, ``client``, ``tenant``, as of ``engine.submit_to_read``.

        Raises:
            PromptTooLong: a query, or with ``truncate=False`` a passage, that the context has no room for.
        """
        prompts = self.prompts(query, passages)
        return self._scores(readings.read(self._submit(terms), prompts, on_done, self._engine.max_queued))

    async def ascore(self, query: str, passages: Iterable[str], **terms: Any) -> list[float]:
        """As :meth:`score`, without blocking the event loop."""
        prompts = await apart(lambda: self.prompts(query, passages))
        return self._scores(await readings.aread(self._submit(terms), prompts, self._engine.max_queued))

    def prompts(self, query: str, passages: Iterable[str]) -> list[list[int]]:
        """The token ids that the model reads for each of *passages*."""
        head, piece, tail = self._around(query)
        room, found = self._most - len(head) - len(tail), []
        for passage in passages:
            filled = fill(piece, instruction=self._instruction, query=query, passage=passage)
            said = self._engine.encode_piece(filled, is_said=True)
            if len(said) > room and (room < 1 or not self._truncate):
                num_tokens = len(head) + len(said) + len(tail)
                raise PromptTooLong(
                    f"a query with a passage has {num_tokens} tokens; there is room for {self._most}: shorten the "
                    "query, split passages, or let them be cut with truncate=True",
                    num_tokens=num_tokens,
                )
            found.append([*head, *said[:room], *tail])
        return found

    def _first_tokens(self) -> tuple[int, ...]:
        """The first token of each text that the form has for yes and no."""
        found = [self._engine.encode_piece(token) for token in self.form.tokens]
        first = tuple(ids[0] for ids in found if ids)
        if len(set(first)) < len(found):
            raise ConfigurationError(
                f"{list(self.form.tokens)} begin with the same token to this model: name others in a form of your own"
            )
        return first

    def _around(self, query: str) -> tuple[list[int], str, list[int]]:
        """Token ids before the piece with the passage, that piece, and token ids behind it."""
        at = next(at for at, piece in enumerate(self._pieces) if "{passage}" in piece)

        def encode(pieces: Sequence[str]) -> list[int]:
            ids: list[int] = []
            for piece in pieces:
                filled = fill(piece, instruction=self._instruction, query=query)
                ids += self._engine.encode_piece(filled, is_said="{query}" in piece)
            return ids

        return [*self._opening, *encode(self._pieces[:at])], self._pieces[at], encode(self._pieces[at + 1 :])

    def _make_pieces(self) -> tuple[list[int], list[str]]:
        """The token ids that open a prompt, and its pieces: the form's, within the model's chat template where it is a
        chat's."""
        engine = self._engine
        if not self.form.is_chat or not engine.has_chat_template:
            return engine.frame[0], list(self.form.pieces)
        said = [{"role": "user", "content": _MARK}]
        before, found, behind = str(engine.apply_chat_template(said, enable_thinking=False)).partition(_MARK)
        if not found:
            raise ConfigurationError(
                f"the chat template of {engine.model_name} leaves out what a user says: name a form of your own"
            )
        return [], [before, *self.form.pieces, behind]

    def _submit(self, terms: dict[str, Any]) -> readings.Submit:
        reading = TokenLogits(self._tokens)
        keep = {"keep": self.form.is_passage_first}
        return functools.partial(self._engine.submit_to_read, reading=reading, **{**keep, **terms})

    def _scores(self, logits: Sequence[Any]) -> list[float]:
        return readings.probabilities(logits, len(self._tokens))[:, 0].tolist()


def ranked(
    items: Iterable[Item], scores: Iterable[float], top_n: int | None, min_score: float
) -> list[tuple[Item, float]]:
    """*items* with their *scores*, the best first: *top_n* at most, none below *min_score*."""
    found = sorted(zip(items, scores, strict=True), key=lambda pair: -pair[1])
    return [pair for pair in found if pair[1] >= min_score][:top_n]
