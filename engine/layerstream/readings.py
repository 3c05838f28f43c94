"""Prompts that are read, not answered, many at a time: what is behind ``engine.embed`` and ``engine.score``.

Prompts are handed in a wave after the other, the next one while the last is computed, so that sweeps stay full and a
hundred thousand texts are no queue of a hundred thousand. If one fails, or whoever waits gives up, nothing of the rest
stays behind.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from layerstream.api import arguments
from layerstream.errors import ConfigurationError, shown

if TYPE_CHECKING:  # whoever imports a wrapper pays for no torch
    from layerstream.api.request import Request
    from layerstream.text.prompt import Prompt

WAVE = 128  # texts: more than a sweep has room for, as a rule

Submit: TypeAlias = "Callable[[Sequence[Prompt]], list[Request]]"
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
    size = _wave(most)
    waves = _waves(prompts, size)
    running: deque[Request] = deque()
    try:
        while running or len(found) < len(prompts):
            while _has_room(len(running), size, most) and (wave := next(waves, None)) is not None:
                running.extend(submit(wave))
            found.append(running[0].result().reading)
            running.popleft()
            if on_done is not None:
                on_done(len(found), len(prompts))
        return found
    except BaseException:
        _cancel(running)
        raise


async def aread(submit: Submit, prompts: Sequence[Prompt], most: int | None = None) -> list[np.ndarray]:
    """As :func:`read`, without blocking the event loop."""
    found: list[np.ndarray] = []
    size = _wave(most)
    waves = _waves(prompts, size)
    running: deque[Request] = deque()
    try:
        while running or len(found) < len(prompts):
            while _has_room(len(running), size, most) and (wave := next(waves, None)) is not None:
                running.extend(submit(wave))
            found.append((await running[0]).reading)
            running.popleft()
        return found
    except BaseException:
        _cancel(running)
        raise


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


def _wave(most: int | None) -> int:
    """Prompts of a wave, where *most* may wait."""
    return WAVE if most is None else max(1, min(WAVE, most))


def _has_room(num_running: int, size: int, most: int | None) -> bool:
    """Whether one more wave of *size* may be handed in beside those that run."""
    return num_running <= size and (most is None or num_running + size <= most or not num_running)


def _waves(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    rest = iter(prompts)
    while wave := list(itertools.islice(rest, size)):
        yield wave


def _cancel(requests: Iterable[Request]) -> None:
    for request in requests:
        request.cancel()
