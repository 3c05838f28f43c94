"""What prompts have in common: with the beginning of an earlier one, and with earlier ones anywhere. Pure.

Token exact, from the prompts as the engine was given them, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

RUN_TOKENS = 32
"""A token was seen before if it is part of so many in a row that stand like that in an earlier prompt."""


@dataclass(frozen=True)
class Sharing:
    """Tokens of all prompts.

    Attributes:
        prompt_tokens: how many there are.
        ideal_tokens: at the beginning of a prompt, as an earlier prompt begins; never its last one, which is computed
            in any case.
        seen_tokens: seen before, wherever.
    """

    prompt_tokens: int
    ideal_tokens: int
    seen_tokens: int


def sharing(prompts: Sequence[Sequence[int]]) -> Sharing:
    """What *prompts* have in common with earlier ones."""
    ideal = seen = 0
    runs: set[tuple[int, ...]] = set()
    for number, prompt in enumerate(prompts):
        longest = max((_common(prompt, earlier) for earlier in prompts[:number]), default=0)
        ideal += min(longest, len(prompt) - 1)
        own = [tuple(prompt[at : at + RUN_TOKENS]) for at in range(len(prompt) - RUN_TOKENS + 1)]
        seen += max(_covered(own, runs), longest)
        runs.update(own)
    return Sharing(sum(map(len, prompts)), ideal, seen)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _covered(own: Sequence[tuple[int, ...]], runs: set[tuple[int, ...]]) -> int:
    """Tokens that are part of a run of *own* that is among *runs*."""
    count = end = 0
    for at, run in enumerate(own):
        if run in runs:
            count += at + RUN_TOKENS - max(at, end)
            end = at + RUN_TOKENS
    return count
