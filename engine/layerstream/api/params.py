"""What a caller may ask of a completion: :class:`SamplingParams`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from layerstream.api import arguments
from layerstream.errors import ConfigurationError, InvalidSamplingParams

MOST_STOPS = 4096  # stop strings, or ids: whoever passes something without an end is told so


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
        seed: same seed, same prompt, same text, alone or among other requests; ``None`` draws a fresh one. Of several
            answers the first has it, and each says its own.
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
        for field in ("ignore_eos", "skip_special_tokens"):
            _set(self, field, arguments.flag(field, getattr(self, field), InvalidSamplingParams))

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
        if value is not None or field == "n":
            object.__setattr__(self, field, arguments.whole_number(field, value, low, high, InvalidSamplingParams))

    def _check_float(self, field: str, low: float, high: float | None, *, above_low: bool = False) -> None:
        value = getattr(self, field)
        if value is not None:
            check = functools.partial(arguments.number, refuse=InvalidSamplingParams)
            object.__setattr__(self, field, check(field, value, low, high, above_low=above_low))


SAMPLING_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_HABITS = {
    "max_new_tokens": "'max_tokens'",
    "max_completion_tokens": "'max_tokens'",
    "max_length": "'max_tokens', which counts new tokens alone",
    "do_sample": "'temperature', where 0 draws nothing",
    "num_beams": "'beam_width'",
    "num_return_sequences": "'n'",
    "repeat_penalty": "'repetition_penalty'",
    "stop_strings": "'stop'",
    "stop_sequences": "'stop'",
    "eos_token_id": "'stop_token_ids', which come beside the model's own",
    "top_logprobs": "'logprobs', a number",
    "guided_json": "'response_format'",
    "timeout": "the call's own timeout=",
    "priority": "the call's own priority=",
    "client": "the call's own client=",
    "tenant": "the call's own tenant=",
}
"""What others call a field, and what it is here."""


Params = SamplingParams | Mapping[str, Any] | None
"""Sampling parameters, a dict of their fields, or ``None`` for the model's own."""


def as_params(params: Params) -> SamplingParams:
    """What a caller means by *params*: parameters, a dict of their fields, or ``None`` for the model's own.

    Raises:
        ConfigurationError: something else, or a field that is not there; says which may be meant.
    """
    if isinstance(params, SamplingParams):
        return params
    if params is None:
        return SamplingParams()
    if not isinstance(params, Mapping):
        raise arguments.refusal("params", params, "SamplingParams, a dict of their fields, or None")
    for name in params:
        if name not in SAMPLING_NAMES:
            hint = arguments.suggestion(name, SAMPLING_NAMES, _HABITS)
            raise ConfigurationError(f"SamplingParams has no field {arguments.shown(name)}{hint}")
    return SamplingParams(**params)


def derive_seed(seed: int, index: int) -> int:
    """The seed of answer *index* of those that *seed* was given for: the first keeps it, the others' follow from both,
    so that neighbouring seeds have no answer in common."""
    if not index:
        return seed
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def merge_params(own: Mapping[str, Any], call: Mapping[str, Any]) -> SamplingParams:
    """What a wrapper was made with, overridden by a call's options; stop strings of both.

    Log-probabilities may be asked for as OpenAI's users do: ``logprobs=True``, with ``top_logprobs``. Options of a call
    that are no sampling parameters are somebody else's and left out.
    """
    fields = {name: value for name, value in own.items() if value is not None and name in SAMPLING_NAMES}
    fields.update({name: value for name, value in call.items() if name in SAMPLING_NAMES})
    fields["stop"] = join_stops(own.get("stop"), call.get("stop"))
    return SamplingParams(**{**fields, "logprobs": _as_logprobs(own, call)})


def _as_logprobs(own: Mapping[str, Any], call: Mapping[str, Any]) -> int | None:
    """The number of tokens to name beside each; ``None``: no log-probabilities. A number of them implies the wish."""
    said = {**own, **{name: value for name, value in call.items() if value is not None}}
    wanted, top = said.get("logprobs"), said.get("top_logprobs")
    if not isinstance(wanted, bool | None):
        return wanted
    if call.get("logprobs") is False:
        return None
    return top if top is not None else 0 if wanted else None


def join_stops(*stops: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings of several places, each once.

    Raises:
        InvalidSamplingParams: something else than strings.
    """
    return tuple(dict.fromkeys(string for some in stops for string in _as_strings("stop", some)))


def _as_strings(field: str, value: Any) -> tuple[str, ...]:
    value = () if value is None else (value,) if isinstance(value, str) else value
    strings = _items(value)
    if strings is None or not all(isinstance(item, str) and item for item in strings):
        raise InvalidSamplingParams(field, value, "a non-empty string or several of them")
    return tuple(map(str.__str__, strings))


def _as_token_ids(field: str, value: Any) -> tuple[int, ...]:
    value = () if value is None else value
    ids = _items(arguments.plain(value)) if not isinstance(arguments.plain(value), int) else (value,)
    if ids is None:
        raise InvalidSamplingParams(field, value, "token ids >= 0")
    refuse: arguments.Refusal = lambda field, item, expected: InvalidSamplingParams(field, value, "token ids >= 0")  # noqa: E731
    return tuple(arguments.whole_number(field, item, 0, None, refuse) for item in ids)


def _items(value: Any) -> tuple[Any, ...] | None:
    """The items of a list, a set, a generator; ``None``: it is nothing of the kind, or has no end."""
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes | bytearray | str):
        return None
    items = tuple(islice(value, MOST_STOPS + 1))
    return items if len(items) <= MOST_STOPS else None


def _as_response_format(value: Any) -> dict[str, Any] | None:
    """One of the five forms, with nothing else in it."""
    if value is None:
        return None
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return {"type": "json_schema", "schema": _schema_of(value)}
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        return {"type": kind}
    if kind == "json_schema":
        nested = value.get("json_schema")
        value = nested if isinstance(nested, Mapping) else value
    known = _FORMATS.get(kind) if isinstance(kind, str) else None
    field, is_right, expected = known or ("type", lambda item: False, f"one of {', '.join(_FORMATS)}")
    if not isinstance(value, Mapping) or not is_right(value.get(field)):
        raise InvalidSamplingParams("response_format", value, f"a mapping whose {field!r} is {expected}")
    return {"type": kind, field: value[field]}


def _schema_of(model: Any) -> Any:
    try:
        return model.model_json_schema()
    except Exception as error:  # whatever pydantic, or the class, says of itself
        raise InvalidSamplingParams("response_format", model, f"a class with a JSON schema ({error})") from error


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
