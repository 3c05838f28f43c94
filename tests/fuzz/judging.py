"""What is wrong with an answer: against plain transformers, or against the same answer given before."""

from __future__ import annotations

from typing import Any

import torch
from layerstream import Completion

WORSE = 2e-3  # than the best logit, relative to the largest over ten: a greedy token may be as much
LOGPROB = 5e-3
LOGPROBS = 3  # asked for with every token

Bits = tuple[Any, ...]


def bits(completions: list[Completion]) -> Bits:
    """All that a caller gets and that has to be the same every time."""
    return tuple(
        (tuple(c.token_ids), c.text, c.finish_reason, tuple((p.token_id, p.logprob, p.top) for p in c.logprobs or ()))
        for c in completions
    )


def difference(found: Bits, expected: Bits) -> str | None:
    """Where *found* is not *expected*; ``None``: nowhere."""
    if found == expected:
        return None
    if len(found) != len(expected):
        return f"{len(found)} answers, not {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one[0] != other[0]:
            at = next((i for i, (a, b) in enumerate(zip(one[0], other[0], strict=False)) if a != b), len(one[0]))
            return f"answer {number} has another token at {at}"
        for at, (a, b) in enumerate(zip(one[3], other[3], strict=False)):
            if a != b:
                return f"answer {number} has another log-probability at {at}, by {a[1] - b[1]:.1e}"
        if one != other:
            return f"answer {number} has {one[1:3]}, not {other[1:3]}"
    return "equal in all parts, and yet not equal"


def against_transformers(model: Any, prompt: tuple[int, ...], completion: Completion, *, is_greedy: bool) -> str | None:
    """What *model* says of *completion* when it is given the same tokens; ``None``: that it is right."""
    tokens = completion.token_ids
    if completion.logprobs is None or [p.token_id for p in completion.logprobs] != tokens:
        return "the log-probabilities are not those of the tokens"
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    for at, (token, given) in enumerate(zip(tokens, completion.logprobs, strict=True)):
        missing = float(logits[at].max() - logits[at, token])
        if is_greedy and missing > WORSE * max(1.0, float(logits[at].abs().max()) / 10):
            return f"token {at} is {token}, whose logit is {missing:.1e} below the best"
        apart = max(
            abs(logprob - float(logprobs[at, other])) for other, logprob in ((token, given.logprob), *given.top)
        )
        if not apart <= LOGPROB:
            return f"a log-probability at {at} is off by {apart:.1e}"
    return None
