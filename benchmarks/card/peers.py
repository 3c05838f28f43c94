"""Others on the same card: plain transformers with everything on it, and accelerate's offload within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.card.shapes import Setting

Say = Callable[..., None]

PROMPT = 16
TOKENS = 24
OFFLOADED_TOKENS = 4  # a second each


def resident(model: Path, setting: Setting, say: Say) -> None:
    """Seconds of a token: ``generate``, and the decode step compiled over a static cache."""
    device = "cpu" if setting.is_pretended else "cuda"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded = loaded.to(device).eval()
    say("transformers, 1 decode", seconds=_token_seconds(loaded, device, TOKENS))
    for count in setting.sequences[1:3]:
        say(f"transformers, {count} decode", seconds=_token_seconds(loaded, device, TOKENS, count))
    if setting.is_pretended:
        say("nothing is compiled without a card")
        return
    options = {"cache_implementation": "static"}  # transformers compiles the decode step then
    say("transformers, static cache, compiled, 1 decode", seconds=_token_seconds(loaded, device, TOKENS, 1, options))


def offload(model: Path, setting: Setting, say: Say) -> None:
    """accelerate, with the memory of the engine for weights and the rest in host memory."""
    if setting.is_pretended:
        say("accelerate needs a card")
        return
    try:
        import accelerate
    except ImportError as error:
        say(f"accelerate is not here: {error}")
        return
    limits: Any = {0: setting.memory["dense"], "cpu": setting.host_memory}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="auto", max_memory=limits)
    seconds = _token_seconds(loaded.eval(), "cuda", OFFLOADED_TOKENS)
    say(f"accelerate {accelerate.__version__}, 1 decode", seconds=seconds)


def _token_seconds(
    model: Any, device: str, tokens: int, num_sequences: int = 1, options: dict[str, Any] | None = None
) -> float:
    """What a token more takes; the first time warms, and compiles."""
    ids = torch.arange(10, 10 + PROMPT * num_sequences, device=device).view(num_sequences, PROMPT)
    taken = []
    for count in (tokens + 2, 2, tokens + 2):
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **(options or {})
            )
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return (taken[2] - taken[1]) / tokens
