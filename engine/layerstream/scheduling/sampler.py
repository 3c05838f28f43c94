"""Logits to tokens.

Penalties, temperature and truncation are transformers' own processors, in the order in which its ``generate`` applies
them. The draw is keyed by (seed, position) and nothing else, so a request gets the same tokens alone or among others,
whatever the order of the batch: every row is processed by itself, and no state is kept between calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerstream.api.completion import TokenLogprob
from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.errors import GrammarError, InvalidLogits

_NO_IDS = torch.empty((1, 0), dtype=torch.long)  # the processors that truncate do not look at tokens
_COLDEST = 1e-30  # below it the temperature is 0 in fp32; here only the best tokens are left already


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token, and its log-probability where it was asked for."""

    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, sequence: Sequence) -> SampledToken:
    """The next token of *sequence*.

    Args:
        logits: ``(vocabulary,)``, any float dtype and device.

    Raises:
        InvalidLogits: NaN or +inf, or -inf throughout; names the sequence. (-inf in places is how models rule tokens
            out.)
    """
    logits = logits.float()
    if not torch.isfinite(logits.max()):  # NaN and +inf win every comparison
        raise InvalidLogits(
            f"the model gave no usable logits for sequence {sequence.sequence_id} at position {sequence.num_tokens}: "
            "weights are damaged, or the dtype overflows (try dtype='float32')"
        )
    if sequence.params.is_greedy:
        token_id = int(torch.argmax(_constrain(_penalise(logits, sequence), sequence)))  # the lowest id on ties
    else:
        token_id = _draw(processed_distribution(logits, sequence), sequence)
    return SampledToken(token_id, _logprob(logits, token_id, sequence.params.logprobs))


def processed_distribution(logits: torch.Tensor, sequence: Sequence) -> np.ndarray:
    """The distribution that the next token is drawn from.

    Args:
        logits: ``(vocabulary,)``, the model's own.

    Returns:
        ``(vocabulary,)`` float64, summing to 1; for a greedy sequence all of it on one token.
    """
    scores = _constrain(_penalise(logits.float(), sequence), sequence)
    if sequence.params.is_greedy:
        probabilities = np.zeros(len(scores))
        probabilities[int(torch.argmax(scores))] = 1.0
        return probabilities
    scores = (scores - scores.max())[None]  # so that no temperature, however low, divides to infinity
    for processor in _processors(sequence.params):
        scores = processor(_NO_IDS, scores)  # pyright: ignore[reportArgumentType]
    return torch.softmax(scores[0].cpu().double(), dim=-1).numpy()


def _penalise(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """*logits* ``(vocabulary,)`` with repetition, presence and frequency penalties applied.

    The repetition penalty is over prompt and output, the other two are OpenAI's: over the output.
    """
    params = sequence.params
    if params.repetition_penalty not in (None, 1.0):
        ids = torch.tensor([sequence.token_ids], device=logits.device)
        processor = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        logits = processor(ids, logits[None])[0].clamp(max=torch.finfo(torch.float32).max)  # pyright: ignore[reportArgumentType]
    if params.presence_penalty or params.frequency_penalty:
        ids = torch.tensor(sequence.output_ids, dtype=torch.long, device=logits.device)
        counts = torch.bincount(ids, minlength=len(logits))
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def _constrain(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """*logits* ``(vocabulary,)`` with what the sequence's grammar rules out at -inf."""
    if sequence.constraint is None:
        return logits
    mask = torch.from_numpy(sequence.constraint.mask()).to(logits.device)
    constrained = torch.where(mask, logits, torch.tensor(float("-inf"), device=logits.device))
    if not torch.isfinite(constrained.max()):
        raise GrammarError("the answer cannot go on: the model itself rules out every token of its response_format")
    return constrained


def _processors(params: SamplingParams) -> list[LogitsProcessor]:
    """What ``generate`` applies after the penalties, in its order."""
    processors: list[LogitsProcessor] = []
    if params.temperature not in (None, 1.0):
        processors.append(TemperatureLogitsWarper(max(float(params.temperature), _COLDEST)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


def _draw(probabilities: np.ndarray, sequence: Sequence) -> int:
    """Inverse CDF at the one uniform number that (seed, position) determine; no seed counts as 0."""
    key = (sequence.params.seed or 0, sequence.num_tokens)
    uniform = np.random.Generator(np.random.Philox(key=key)).random()
    cumulated = np.cumsum(probabilities)
    token_id = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return min(token_id, int(np.flatnonzero(probabilities)[-1]))  # rounding may reach the very end


def _logprob(logits: torch.Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1).cpu()
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        least = torch.topk(logprobs, min(num_top, len(logprobs))).values[-1]
        ids = torch.nonzero(logprobs >= least)[:, 0]  # with all that tie for the last place: topk picks among them
        order = torch.argsort(logprobs[ids], descending=True, stable=True)[:num_top]
        top = tuple(zip(ids[order].tolist(), logprobs[ids[order]].tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
