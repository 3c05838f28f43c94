"""What the model's own files say about sampling and about the end of an answer."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream.api.params import SamplingParams
from layerstream.checkpoint.folder import MAX_CONFIG_BYTES
from layerstream.checkpoint.reading import read_object
from layerstream.errors import InvalidHeader, InvalidSamplingParams

logger = logging.getLogger(__name__)

LEAST_TOP_P = 1e-9  # leaves one token
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
    at the tokenizer's: chat models exist whose file names only the EOS of the base model. What transformers lives with
    is warned of, and counts as it does there.

    Raises:
        InvalidHeader: the file is no JSON object, or a value in it cannot be used.
    """
    path = folder / _FILE
    said = read_object(path, MAX_CONFIG_BYTES) if os.path.lexists(path) else {}
    does_sample = bool(said.get("do_sample"))
    values: dict[str, Any] = {**_NEUTRAL, "temperature": 1.0} if does_sample else dict(_NEUTRAL)
    given = [name for name in _NEUTRAL if said.get(name) is not None]
    named = tuple(name for name in given if does_sample or name == "repetition_penalty")
    for name in given:
        value = _top_p(said[name], path) if name == "top_p" and name in named else said[name]
        try:
            SamplingParams(**{name: value})
        except InvalidSamplingParams as error:
            if name in named:
                raise InvalidHeader(
                    f"{path}: {name} cannot be used ({error}); correct the file, or delete it"
                ) from error
            logger.warning("%s: %s is %.80r, which does not count without do_sample", path, name, value)
        if name in named:
            values[name] = value
    ends = _ids(said.get("eos_token_id"), path, config) or _ids(getattr(config, "eos_token_id", None), path, config)
    return GenerationDefaults(SamplingParams(**values), ends | _ids(tokenizer.eos_token_id, path, config), named)


def _top_p(value: Any, path: Path) -> Any:
    """As transformers takes it: from 1 on there is no limit, and 0 leaves the most probable token."""
    if not isinstance(value, int | float) or isinstance(value, bool) or 0 < value <= 1 or not 0 <= value < math.inf:
        return value
    logger.warning("%s: top_p is %r; taken as %s", path, value, "no limit" if value else "the most probable token")
    return 1.0 if value else LEAST_TOP_P


def _ids(value: Any, path: Path, config: Any) -> frozenset[int]:
    """Token ids as files have them: one, several or none. Those that no token has end nothing."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, int | float) for item in ids):
        raise InvalidHeader(f"{path}: eos_token_id is {value!r:.80}; expected an int or a list of them")
    size = getattr(config, "vocab_size", None) or math.inf
    found = frozenset(int(item) for item in ids if not isinstance(item, bool) and 0 <= item < size and item % 1 == 0)
    if not all(type(item) is int and item in found for item in ids):
        logger.warning("%s: eos_token_id is %.80r; taken as %s", path, value, sorted(found) or "none")
    return found
