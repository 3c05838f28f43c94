"""What comes back: :class:`Completion` whole, :class:`Delta` piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


def why_cut_off(reason: str | None, limit: str = "max_tokens") -> str:
    """What to say of an answer that should be whole and is not; *limit* is how its longest length is called."""
    if reason == "length":
        return f"was cut off: allow more tokens ({limit}), or shorten the prompt where the context is full"
    if reason == "cancelled":
        return "was given up before it was whole: ask again"
    return "ended before its value did: look for a stop string that is part of the value"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one completion.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those among them whose KV was there before and was not computed again.
        completion_tokens: tokens generated, a final EOS included.
        blended_tokens: those of the prompt whose KV was moved from where they stood before (``reuse="anywhere"``), and
            is nearly, not exactly, what computing them here would give.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    blended_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class CompletionMetrics:
    """What one completion took.

    Attributes:
        sweeps: passes over the model that carried rows of this request.
        streamed_bytes: weight bytes read during those sweeps; requests in the same sweep share them.
        first_token_seconds: from submission to the first token.
        loaded_tokens: prompt tokens whose KV came from the store.
        recomputed_tokens: prompt tokens that the store had and that it was faster to compute again.
        seconds: from submission to the end.
        drafted_tokens: guesses that were verified; accepted_tokens: those of them that were right.
        forced_tokens: tokens that a grammar left no choice about; they took no sweep.
        tokens_per_sweep: tokens generated per sweep, those that prefilled counted.
    """

    sweeps: int
    streamed_bytes: int
    first_token_seconds: float
    seconds: float
    loaded_tokens: int = 0
    recomputed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    tokens_per_sweep: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a generated token under the model's own distribution, before any penalty.

    ``top`` holds the most probable tokens, best first, as ``(token_id, logprob)``.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    ``index`` counts the ``n`` completions of one prompt. ``text`` leaves out special tokens and stop strings;
    ``token_ids`` holds every generated token. Of a prompt that was read (:mod:`layerstream.api.reading`) there are
    none, and ``reading`` is what was wanted: a float32 array of NumPy, of as many logits, or of the hidden size.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    metrics: CompletionMetrics
    index: int = 0
    seed: int | None = None
    logprobs: list[TokenLogprob] | None = None
    reading: Any = None


def openai_logprobs(completion: Completion, decode: Callable[[list[int]], str]) -> dict[str, Any] | None:
    """Log-probabilities in OpenAI's form; ``None`` where none were asked for."""
    if completion.logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = decode([token_id])
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    return {
        "content": [
            {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*best) for best in token.top]}
            for token in completion.logprobs
        ]
    }


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sweep added to an answer; ``finish_reason`` is set on the last one, ``completion`` too.

    ``text`` may be empty while a character or a possible stop string is incomplete.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    index: int = 0
    completion: Completion | None = None
