"""An answer that is searched for with beams: several sequences run for one request."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from layerstream.core.sequence import Sequence
from layerstream.core.tenancy import Tenancy
from layerstream.runtime.answer import Answer
from layerstream.scheduling.beam import BeamSearch
from layerstream.scheduling.sampler import SampledToken

Fork = Callable[[Sequence, Sequence], None]
_numbers = itertools.count(2**40)  # of forked sequences: behind all that were submitted


@dataclass(eq=False)
class BeamAnswer(Answer):
    """The beams of one prompt; ``sequence`` is the first of them.

    Beams are in every sweep together: they are admitted with memory for all of them, and never suspended.

    Args:
        make_answer: an empty answer for the hypothesis of an index.
    """

    search: BeamSearch = field(kw_only=True)
    make_answer: Callable[[int], Answer] = field(kw_only=True)
    _beams: list[Sequence] = field(default_factory=list)
    _logits: dict[Sequence, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._beams = [self.sequence] * self.search.width

    def collect(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """A sweep brought the logits ``(vocabulary,)`` that follow beam *sequence*; they are looked at before the next
        one."""
        self._logits[sequence] = logits

    def advance(self, fork: Fork) -> list[Sequence]:
        """Every beam has its logits: choose the next ones.

        Args:
            fork: makes its second argument a running copy of the first.

        Returns:
            Beams that are gone.
        """
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.submitted
        logprobs = (torch.log_softmax(self._logits[beam].float(), dim=-1).cpu().numpy() for beam in self._beams)
        going = self.search.step(logprobs, [beam.output_ids for beam in self._beams])
        self._logits.clear()
        parents = [self._beams[found.beam] for found in going]
        gone = [beam for beam in dict.fromkeys(self._beams) if beam not in parents]
        beams: list[Sequence] = []
        for parent in parents:
            if parent in beams:
                child = dataclasses.replace(
                    parent, sequence_id=next(_numbers), token_ids=list(parent.token_ids), tenancy=Tenancy()
                )
                fork(parent, child)
                parent = child
            beams.append(parent)
        for beam, found in zip(beams, going, strict=True):
            beam.token_ids.append(found.token_id)
        self._beams = beams
        return gone

    @property
    def is_over(self) -> bool:
        """Whether the search is."""
        return not self._beams

    def deliver(self) -> bool:
        """Tell the request what was found, once the search is over."""
        if not self.is_over:
            return False
        for index, hypothesis in enumerate(self.search.best(self.sequence.params.n)):
            answer = self.make_answer(index)
            answer.num_sweeps, answer.streamed_bytes = self.num_sweeps, self.streamed_bytes
            had = self.sequence.tenancy
            answer.sequence.tenancy = Tenancy(num_cached=had.num_cached, num_blended=had.num_blended)
            for token_id in hypothesis.token_ids:
                if not answer.is_over:  # one that went on for want of others ends where it ended
                    answer.accept(SampledToken(token_id, None))
            answer.deliver()
        return True

    def cancel(self) -> None:
        """End here, at the caller's wish, with nothing found."""
        for index in range(self.sequence.params.n):
            self.make_answer(index).cancel()


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the *count* largest of *values*, in torch's order: a :data:`~layerstream.scheduling.beam.Top`."""
    return torch.topk(torch.from_numpy(values)[None], count).indices[0].numpy()
