"""What the model's own files say about sampling and about the end of an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.errors import InvalidHeader
from layerstream.params import SamplingParams

_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and the tokens that end an answer.

    Attributes:
        named: the fields that ``generation_config.json`` sets itself.
    """

    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    named: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log."""
        if self.sampling.is_greedy:
            return "greedy by default"
        fields = ", ".join(f"{name} {getattr(self.sampling, name):g}" for name in self.named) or "temperature 1"
        return f"samples by default with {fields} (generation_config.json)"


def load_defaults(folder: Path, config: Any, tokenizer: Any) -> GenerationDefaults:
    """Read ``generation_config.json``; only what it says itself counts, not transformers' fill-ins (``top_k=50``)."""
    path = folder / "generation_config.json"
    said: dict[str, Any] = {}
    if path.is_file():
        try:
            said = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InvalidHeader(f"{path}: not JSON ({error}); fetch it again, or delete it") from error
    values = dict(_NEUTRAL)
    named: tuple[str, ...] = ()
    if said.get("do_sample"):
        values["temperature"] = 1.0
        named = tuple(name for name in _NEUTRAL if said.get(name) is not None)
        values.update({name: said[name] for name in named})
    elif said.get("repetition_penalty") is not None:
        values["repetition_penalty"] = said["repetition_penalty"]
        named = ("repetition_penalty",)
    ends = _ids(said.get("eos_token_id")) or _ids(getattr(config, "eos_token_id", None))
    return GenerationDefaults(SamplingParams(**values), ends | _ids(tokenizer.eos_token_id), named)


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
