"""A prompt that is read, not answered: an :class:`Answer` of no tokens. Owned by the engine's thread.

What the mean of all rows is made of comes chunk by chunk, over several sweeps. Sums of chunks are kept until the last
one is there, because a chunk may be computed a second time, when memory was taken from the sequence meanwhile; they are
added in order, so the mean has the same bits however the chunks came.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from layerstream.api.completion import Delta
from layerstream.api.reading import TokenLogits
from layerstream.core.sweep import Span
from layerstream.errors import InvalidLogits, RequestTimeout
from layerstream.runtime.answer import Answer


@dataclass(eq=False)
class ReadAnswer(Answer):
    """What is read of one prompt."""

    _sums: dict[int, torch.Tensor] = field(default_factory=dict)
    _found: torch.Tensor | None = None

    def see_logits(self, logits: torch.Tensor) -> None:
        """A sweep brought the logits ``(vocabulary,)`` after the last token.

        Raises:
            InvalidLogits: those that are wanted are no numbers.
        """
        reading = self.sequence.reading
        assert isinstance(reading, TokenLogits)
        self._find(logits[list(reading.token_ids)].float().cpu())

    def see_hidden(self, span: Span, total: torch.Tensor) -> None:
        """A sweep brought *total* ``(hidden,)``: the sum over the rows of *span* that are wanted.

        Raises:
            InvalidLogits: it is not finite.
        """
        for start in [start for start in self._sums if start >= span.start]:
            del self._sums[start]
        self._sums[span.start] = total
        if span.stop == self.sequence.num_prompt_tokens:
            count = self.sequence.num_prompt_tokens if self.sequence.reads_all_rows else 1
            self._find(torch.stack([self._sums[start] for start in sorted(self._sums)]).sum(0) / count)

    @property
    def is_over(self) -> bool:
        """Whether all of it is there."""
        return self._found is not None

    def deliver(self) -> bool:
        """Tell the request what was read, once all of it is there."""
        if self._found is None:
            return False
        completion = dataclasses.replace(self._complete("stop"), reading=self._found.numpy())
        self.request.push(Delta("", [], "stop", self.index, completion))
        return True

    def timed_out(self) -> RequestTimeout:
        """Why it is given up."""
        sequence = self.sequence
        return RequestTimeout(
            f"given up after {self.deadline - self.submitted:g} seconds with {sequence.num_computed} of "
            f"{sequence.num_prompt_tokens} tokens read: allow it more time, or read fewer texts at once"
        )

    def _find(self, found: torch.Tensor) -> None:
        if not torch.isfinite(found).all():
            raise InvalidLogits(
                f"the model gave no usable numbers for sequence {self.sequence.sequence_id}, which is read: weights "
                "are damaged, or the dtype overflows (try dtype='float32')"
            )
        self._found = found
