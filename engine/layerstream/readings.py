"""Prompts that are read, not answered, many at a time: what is behind ``engine.embed`` and ``engine.score``.

Prompts are handed in a wave after the other (:mod:`layerstream.waves`). If one fails, or whoever waits gives up,
nothing of the rest stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from layerstream.api import arguments
from layerstream.api.apart import apart
from layerstream.errors import ConfigurationError, shown
from layerstream.waves import Submit, Waves

if TYPE_CHECKING:  # whoever imports a wrapper pays for no torch
    from layerstream.text.prompt import Prompt

OnDone: TypeAlias = Callable[[int, int], None]


def read(
    submit: Submit, prompts: Sequence[Prompt], on_done: OnDone | None = None, most: int | None = None
) -> list[np.ndarray]:
    """What was read of each of *prompts*, in order.

    Args:
        submit: hands several in.
        most: that may wait at a time; ``None``: any number.
        on_done: called with the number of prompts done and of all, after each.
    """
    found: list[np.ndarray] = []
    with Waves(submit, prompts, most) as waves:
        while (request := waves.next()) is not None:
            found.append(request.result().reading)
            if on_done is not None:
                on_done(len(found), len(prompts))
    return found


async def aread(submit: Submit, prompts: Sequence[Prompt], most: int | None = None) -> list[np.ndarray]:
    """As :func:`read`, without blocking the event loop."""
    found: list[np.ndarray] = []
    with Waves(submit, prompts, most) as waves:
        while True:
            waves.step()
            if waves.is_due:
                await apart(waves.hand_in)
            if (request := waves.first) is None:
                return found
            found.append((await request).reading)


def normalized(vectors: Sequence[np.ndarray], width: int, *, is_wanted: bool = True) -> np.ndarray:
    """*vectors* as ``(n, width)``; where *is_wanted*, each of length 1."""
    found = np.stack(vectors) if vectors else np.zeros((0, width), dtype=np.float32)
    if not is_wanted:
        return found
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def probabilities(logits: Sequence[np.ndarray], width: int) -> np.ndarray:
    """``(n, width)``: of several tokens their shares of each other, of one what a logistic function makes of it."""
    found = np.stack(logits).astype(np.float64) if logits else np.zeros((0, width))
    if width == 1:
        return 1.0 / (1.0 + np.exp(-found))
    raised = np.exp(found - found.max(axis=1, keepdims=True)) if len(found) else found
    return raised / raised.sum(axis=1, keepdims=True)


def token_ids_of(tokens: Iterable[str | int], encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The token ids of *tokens*, of which a text has to be one token.

    Raises:
        ConfigurationError: no tokens, or one that is several.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise arguments.refusal("tokens", tokens, "a list of texts or token ids")
    found = [_token_id(token, encode) for token in tokens]
    if not found:
        raise arguments.refusal("tokens", tokens, "one at least")
    return tuple(found)


def _token_id(token: Any, encode: Callable[[str], list[int]]) -> int:
    if not isinstance(token, str):
        return arguments.whole_number("tokens", token, 0)
    ids = encode(token)
    if len(ids) != 1:
        raise ConfigurationError(
            f"{shown(token)} is {len(ids)} tokens to this model; expected one: name others, or a token's id"
        )
    return ids[0]
