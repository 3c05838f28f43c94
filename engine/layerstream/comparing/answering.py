"""The engine's side: a prompt answered on this thread, with hooks on its modules."""

from __future__ import annotations

from collections.abc import Callable

import torch

from layerstream.comparing.recording import Record, Taps
from layerstream.setup.assembly import Assembly
from layerstream.setup.stepping import step_greedily


def answer(
    parts: Assembly, ids: list[int], num_tokens: int, record: Record, tap: Callable[[Taps], None]
) -> tuple[list[int], torch.Tensor]:
    """The most probable tokens after *ids*, and the logits ``(num_tokens, vocabulary)`` that they were chosen from.

    Every row is computed: what an earlier answer left in memory is forgotten first.

    Args:
        tap: says what is to be in *record*.
    """
    prefixes = parts.scheduler.prefixes
    prefixes.evict(len(prefixes))
    with Taps(parts.skeleton.model, record).open() as taps:
        tap(taps)
        tokens, logits = step_greedily(parts, [ids], num_tokens)
    return tokens[0], logits[0]
