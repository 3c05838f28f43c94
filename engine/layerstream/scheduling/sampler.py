"""Logits to tokens.

Penalties, temperature and truncation are transformers' own processors, in the order in which its ``generate`` applies
them. The draw is keyed by (seed, position) and nothing else, so a request gets the same tokens alone or among others,
whatever the order of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerstream.completion import TokenLogprob
from layerstream.errors import InvalidLogits
from layerstream.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token, and its log-probability where it was asked for."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Draws the next token of sequences."""

    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[SampledToken]:
        """One token per row of *logits* ``(n, vocabulary)``; row i belongs to ``sequences[i]``.

        Raises:
            InvalidLogits: a row has a NaN, or no finite value.
        """
        return [self._sample_row(row.float(), sequence) for row, sequence in zip(logits, sequences, strict=True)]

    def _sample_row(self, logits: torch.Tensor, sequence: Sequence) -> SampledToken:
        if torch.isnan(logits).any() or not torch.isfinite(logits).any():
            raise InvalidLogits(
                f"the model gave no usable logits for sequence {sequence.sequence_id}, position {sequence.num_tokens}:"
                " weights are damaged, or the dtype overflows (try dtype='float32')"
            )
        if sequence.params.is_greedy:
            token = int(torch.argmax(penalise(logits, sequence)))
        else:
            token = _draw(processed_distribution(logits, sequence), sequence)
        return SampledToken(token, _logprob(logits, token, sequence.params.logprobs))


def penalise(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """*logits* ``(vocabulary,)`` with repetition, presence and frequency penalties applied."""
    params = sequence.params
    if params.repetition_penalty not in (None, 1.0):
        ids = torch.tensor([sequence.token_ids])
        logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits[None].clone())[0]  # type: ignore[arg-type]
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(torch.tensor(sequence.output_ids, dtype=torch.long), minlength=len(logits))
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def processed_distribution(logits: torch.Tensor, sequence: Sequence) -> np.ndarray:
    """The distribution that the next token is drawn from: ``(vocabulary,)`` float64, summing to 1."""
    params = sequence.params
    ids = torch.tensor([sequence.token_ids])
    scores = penalise(logits, sequence)[None]
    warpers = []
    if params.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1).numpy()


def _draw(probabilities: np.ndarray, sequence: Sequence) -> int:
    """Inverse CDF at one uniform number that (seed, position) determine."""
    key = (sequence.params.seed or 0, sequence.num_tokens)
    uniform = np.random.Generator(np.random.Philox(key=key)).random()
    cumulated = np.cumsum(probabilities)
    token = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(token, int(np.flatnonzero(probabilities)[-1]))


def _logprob(logits: torch.Tensor, token: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, min(num_top, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
