"""What a caller may ask of a completion: :class:`SamplingParams`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerstream.errors import InvalidSamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when they stop.

    ``None`` means "the model's own default" (``generation_config.json``), and where the model has none,
    the neutral value in brackets. :meth:`with_defaults` fills them in; ``engine.sampling_defaults`` shows them.

    Attributes:
        max_tokens: new tokens at most; ``None``: what fits the speed (the engine logs its choice).
        temperature: 0 is greedy [0]; otherwise logits are divided by it.
        top_p: smallest set of tokens with this much probability, in (0, 1] [1].
        top_k: this many most probable tokens; 0 switches it off [0].
        min_p: tokens with at least this share of the best token's probability, in [0, 1] [0].
        repetition_penalty: as in CTRL (arXiv 1909.05858), over prompt and output, > 0 [1].
        presence_penalty: subtracted once from the logits of tokens already in the output [0].
        frequency_penalty: subtracted once per occurrence in the output [0].
        stop: strings that end the text; they are matched across token boundaries and never shown. One that is a special
            token counts as its id.
        stop_token_ids: ids that end the text, beside the model's EOS.
        skip_special_tokens: leave special tokens out of the text.
        ignore_eos: go on past the model's EOS.
        seed: same seed, same prompt, same text, alone or among other requests; ``None`` draws a fresh one.
        n: completions per prompt.
        best_of: sample this many and return the *n* whose tokens are most probable on average; at least ``n``.
        beam_width: beam search with this many beams: the most probable answers instead of samples. Greedy settings
            only; the *n* best are returned (at most as many as beams).
        length_penalty: of beam search: scores are divided by length to this power [1].
        logprobs: return the log-probability of each token and of this many most probable ones.
        response_format: what the answer must be: ``{"type": "json_schema", "schema": {...}}``, ``{"type":
            "json_object"}``, ``{"type": "regex", "regex": "..."}``, ``{"type": "choice", "choices": [...]}``,
            ``{"type": "grammar", "grammar": "..."}`` (EBNF: Lark or GBNF), or a pydantic model class. OpenAI's nested
            form of a JSON schema is taken too.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    logprobs: int | None = None
    response_format: Any = None

    def __post_init__(self) -> None:
        _set = object.__setattr__
        _set(self, "stop", _as_strings("stop", self.stop))
        _set(self, "stop_token_ids", _as_token_ids("stop_token_ids", self.stop_token_ids))
        _set(self, "response_format", _as_response_format(self.response_format))
        self._check_int("max_tokens", 1, None)
        self._check_float("temperature", 0.0, None)
        self._check_float("top_p", 0.0, 1.0, above_low=True)
        self._check_int("top_k", 0, None)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("repetition_penalty", 0.0, None, above_low=True)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_int("seed", 0, 2**63 - 1)
        self._check_int("n", 1, 256)
        self._check_int("best_of", self.n, 256)
        self._check_int("beam_width", max(2, self.n), 32)
        self._check_float("length_penalty", -10.0, 10.0)
        self._check_int("logprobs", 0, 100)
        self._check_beams()
        for flag in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, flag), bool):
                raise InvalidSamplingParams(flag, getattr(self, flag), "True or False")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return not self.temperature

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """A copy whose ``None`` fields are taken from *defaults*."""
        missing = {
            field.name: getattr(defaults, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        return dataclasses.replace(self, **missing)

    def _check_beams(self) -> None:
        if self.beam_width is None:
            return
        for field, is_neutral in (
            ("temperature", not self.temperature),
            ("best_of", self.best_of is None),
            ("logprobs", self.logprobs is None),
            ("stop", not self.stop),
            ("repetition_penalty", self.repetition_penalty in (None, 1.0)),
            ("presence_penalty", not self.presence_penalty),
            ("frequency_penalty", not self.frequency_penalty),
            ("response_format", self.response_format is None),
        ):
            if not is_neutral:
                raise InvalidSamplingParams(field, getattr(self, field), "nothing beside beam_width")

    def _check_int(self, field: str, low: int, high: int | None) -> None:
        value = getattr(self, field)
        if value is None and field != "n":
            return
        expected = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise InvalidSamplingParams(field, value, expected)

    def _check_float(self, field: str, low: float, high: float | None, *, above_low: bool = False) -> None:
        value = getattr(self, field)
        if value is None:
            return
        bracket = "(" if above_low else "["
        expected = (
            f"a number {'>' if above_low else '>='} {low:g}"
            if high is None
            else f"a number in {bracket}{low:g}, {high:g}]"
        )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidSamplingParams(field, value, expected)
        if value < low or (above_low and value == low) or (high is not None and value > high):
            raise InvalidSamplingParams(field, value, expected)


SAMPLING_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def merge_params(own: Mapping[str, Any], call: Mapping[str, Any]) -> SamplingParams:
    """What a wrapper was made with, overridden by a call's options; stop strings of both.

    Options of a call that are no sampling parameters are somebody else's and left out.
    """
    fields = {name: value for name, value in own.items() if value is not None}
    fields.update({name: value for name, value in call.items() if name in SAMPLING_NAMES})
    return SamplingParams(**{**fields, "stop": join_stops(own.get("stop"), call.get("stop"))})


def join_stops(*stops: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings of several places, each once.

    Raises:
        InvalidSamplingParams: something else than strings.
    """
    return tuple(dict.fromkeys(string for some in stops for string in _as_strings("stop", some)))


def _as_strings(field: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    value = () if value is None else (value,) if isinstance(value, str) else value
    strings = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(item, str) and item for item in strings):
        raise InvalidSamplingParams(field, value, "a non-empty string or several of them")
    return strings


def _as_token_ids(field: str, value: Iterable[int] | None) -> tuple[int, ...]:
    ids = () if value is None else tuple(value)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise InvalidSamplingParams(field, value, "token ids >= 0")
    return ids


def _as_response_format(value: Any) -> dict[str, Any] | None:
    """One of the five forms, with nothing else in it."""
    if value is None:
        return None
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return {"type": "json_schema", "schema": value.model_json_schema()}
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        return {"type": kind}
    if kind == "json_schema":
        nested = value.get("json_schema")
        value = nested if isinstance(nested, Mapping) else value
    field, is_right, expected = _FORMATS.get(kind, ("type", lambda item: False, f"one of {', '.join(_FORMATS)}"))
    if not isinstance(value, Mapping) or not is_right(value.get(field)):
        raise InvalidSamplingParams("response_format", value, f"a mapping whose {field!r} is {expected}")
    return {"type": kind, field: value[field]}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


_FORMATS: dict[Any, tuple[str, Callable[[Any], bool], str]] = {
    "json_schema": ("schema", lambda schema: isinstance(schema, Mapping | bool), "a JSON schema"),
    "regex": ("regex", _is_text, "a regular expression"),
    "choice": (
        "choices",
        lambda choices: isinstance(choices, list | tuple) and bool(choices) and all(map(_is_text, choices)),
        "a list of texts",
    ),
    "grammar": ("grammar", _is_text, "a grammar in EBNF"),
}
