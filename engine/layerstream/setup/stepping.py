"""Prompts answered greedily on the caller's thread, sweep by sweep, with every logit in sight."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch

from layerstream.api.params import SamplingParams
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.scheduling.composing import Drafting
from layerstream.scheduling.verify import verify
from layerstream.setup.assembly import Assembly


def step_greedily(
    parts: Assembly,
    prompts: Seq[Seq[int]],
    num_tokens: int,
    drafting: Drafting | None = None,
    watch: Callable[[Sweep], None] | None = None,
    between: Callable[[], None] | None = None,
) -> tuple[list[list[int]], list[Any]]:
    """Answer *prompts* in shared sweeps, on this thread, with guesses of *drafting*; no text, no stop.

    Args:
        watch: told every sweep before it runs.
        between: called before a sweep is composed.

    Returns:
        ``num_tokens`` token ids per prompt, and the logits ``(num_tokens, vocabulary)`` that each was chosen from.
    """
    params = SamplingParams(max_tokens=num_tokens)
    sequences = [Sequence(index, list(ids), len(ids), params) for index, ids in enumerate(prompts)]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for sequence in sequences:
        parts.scheduler.add(sequence)
    while parts.scheduler.num_waiting or parts.scheduler.num_running:
        if between is not None:
            between()
        sweep = parts.steward.schedule(drafting) if drafting else parts.steward.schedule()
        for _, error in parts.scheduler.take_failed():
            raise error
        if sweep is None:  # a page is being stored
            time.sleep(0.001)
            continue
        if watch is not None:
            watch(sweep)
        rows = parts.step.run(sweep)
        parts.scheduler.check_integrity()
        if rows is None:
            continue
        for sequence, own in sweep.logit_rows():

            def draw(node: int, sequence: Sequence = sequence, rows: list[torch.Tensor] = [*rows[own]]):  # noqa: B006
                row = rows[node + 1].clone()
                logits[sequence.sequence_id].append(row)
                sequence.token_ids.append(int(row.argmax()))
                return sequence.token_ids[-1:], sequence.num_output_tokens < num_tokens

            right = verify(sweep.drafts.get(sequence), draw)
            if sequence.num_output_tokens == num_tokens:
                parts.steward.remove(sequence)
            else:
                parts.step.accept(sequence, right)
    return [sequence.output_ids for sequence in sequences], [torch.stack(rows) for rows in logits]
