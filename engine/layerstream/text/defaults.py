"""What the model's own files say about sampling and about the end of an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.errors import InvalidHeader, InvalidSamplingParams
from layerstream.params import SamplingParams

_FILE = "generation_config.json"
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and the tokens that end an answer.

    Attributes:
        sampling: every field that a model may set has a value; ``max_tokens`` and ``seed`` are ``None``.
        named: the sampling fields that ``generation_config.json`` sets itself and that count.
    """

    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    named: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log: ``"temperature 0.6, top_p 0.9 from generation_config.json"``."""
        fields = [f"{name} {getattr(self.sampling, name):g}" for name in self.named]
        if self.sampling.is_greedy:
            fields.insert(0, "greedy")
        elif "temperature" not in self.named:
            fields.insert(0, f"temperature {self.sampling.temperature:g}")
        return ", ".join(fields) + (f" from {_FILE}" if not self.sampling.is_greedy or self.named else " by default")


def load_defaults(folder: Path, config: Any, tokenizer: Any) -> GenerationDefaults:
    """Read ``generation_config.json``; only what it says itself counts, not transformers' fill-ins (``top_k=50``).

    As in transformers' ``generate``: sampling only with ``do_sample``, at temperature 1 unless one is given, and
    without it the repetition penalty alone counts. An answer ends at the file's EOS (without one, at the config's) and
    at the tokenizer's: chat models exist whose file names only the EOS of the base model.

    Raises:
        InvalidHeader: the file is no JSON object, or a value in it cannot be used.
    """
    path = folder / _FILE
    said = _read(path)
    values: dict[str, Any] = dict(_NEUTRAL)
    if said.get("do_sample"):
        values["temperature"] = 1.0
        named = tuple(name for name in _NEUTRAL if said.get(name) is not None)
    else:
        named = tuple(name for name in ("repetition_penalty",) if said.get(name) is not None)
    values.update({name: said[name] for name in named})
    try:
        sampling = SamplingParams(**values)
        ends = _ids(said.get("eos_token_id")) or _ids(getattr(config, "eos_token_id", None))
    except InvalidSamplingParams as error:
        raise InvalidHeader(
            f"{path}: {error.field} cannot be used ({error}); correct the file, or delete it"
        ) from error
    except TypeError as error:
        raise InvalidHeader(
            f"{path}: eos_token_id is {said.get('eos_token_id')!r:.80}; expected an int or a list of them"
        ) from error
    return GenerationDefaults(sampling, ends | _ids(tokenizer.eos_token_id), named)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of the encoding, too
        raise InvalidHeader(f"{path}: not JSON ({error}); fetch it again, or delete it") from error
    if not isinstance(said, dict):
        raise InvalidHeader(f"{path}: found a JSON {type(said).__name__}, expected an object; fetch it again")
    return said


def _ids(value: int | list[int] | None) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise TypeError(f"token ids are ints, not {value!r:.80}")
    return frozenset(ids)
