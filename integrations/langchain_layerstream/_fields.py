"""What both wrappers have in common: their fields, the engine behind them, and sampling parameters out of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from langchain_core.language_models import LangSmithParams
from layerstream import __version__
from layerstream.api.completion import Completion, openai_logprobs
from layerstream.api.params import SAMPLING_NAMES, SamplingParams, merge_params
from layerstream.api.prompt_layout import PromptLayout
from layerstream.errors import ConfigurationError
from layerstream.handle import EngineHandle, check_call, check_fields, default_model
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens",
)  # fmt: skip
_LOGPROBS = ("logprobs", "top_logprobs")
_TERMS = ("timeout", "priority", "client")
_IGNORED_IN_CALLS = frozenset({"stream", "stream_usage", "strict", "ls_structured_output_format"})


class EngineFields(BaseModel):
    """The engine and how its tokens are drawn; ``None`` is the model's own default."""

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
    )

    model: str = Field(default_factory=default_model, alias="model_name")
    """Folder, hub id, ``.gguf`` file or ``"demo"``; by default what ``LAYERSTREAM_MODEL`` names, else the bundled
    reader."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """A :class:`layerstream.LayerStream` to share; ``model`` then follows from it."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine, such as ``{"memory": "3GiB"}``."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Tokens are drawn from the smallest set with this much probability."""
    top_k: int | None = None
    """Tokens are drawn from this many."""
    min_p: float | None = None
    """Tokens less probable than this share of the best one's are left out."""
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    """Same seed, same prompt, same text."""
    max_tokens: int | None = None
    """Tokens of an answer at most; by default what fits the speed."""
    stop: list[str] | None = None
    """Strings that end an answer; those of a call come on top."""
    timeout: float | None = None
    """Seconds after which an unfinished answer is given up."""
    priority: int = 0
    """Where requests have to wait for each other, more goes first."""
    client: str = ""
    """Whom it is for; clients share the engine fairly."""
    prompt_layout: PromptLayout = "as_given"
    """``"context_first"``: where a prompt has a labelled question and then a labelled, longer context, the question is
    moved behind it, so that the context's KV is found again. (``context_first(prompt)`` does it in a template.)"""
    streaming: bool = False
    """Answer ``invoke`` from a stream, so that callbacks hear every token."""
    max_retries: int | None = Field(default=None, exclude=True)
    """Taken because LangChain's models have it. Nothing is sent anywhere, so nothing is sent twice."""
    api_key: Any = Field(default=None, exclude=True, repr=False)
    """Taken because LangChain's models have it, and not used."""

    _handle: EngineHandle = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, values: Any) -> Any:
        """Say what an unknown field might have been meant for."""
        if not isinstance(values, Mapping):
            return values
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)}
        check_fields(cls.__name__, values, known)
        return values

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_a_list(cls, value: Any) -> Any:
        """One string may stand alone."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _bind_layerstream_engine(self) -> Self:
        """Bind the engine, which loads at first use."""
        chosen = self.model if "model" in self.model_fields_set else None
        self._handle = EngineHandle(chosen, self.engine_kwargs, self.engine)
        self.model = self._handle.model
        self._sampling(None, {})  # a value out of range is said now
        return self

    @model_validator(mode="after")
    def _set_layerstream_version(self) -> Self:
        """Tracing says which version answered."""
        add = getattr(self, "_add_version", None)
        if callable(add):
            add("layerstream", __version__)
        return self

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that an answer depends on: LangChain's caches use it as their key."""
        return {
            **self._handle.identity,
            **{name: getattr(self, name) for name in _SAMPLING_FIELDS},
            "prompt_layout": self.prompt_layout,
            "stop_strings": self.stop,  # "stop" would be overwritten by that of the call
        }

    def load(self) -> LayerStream:
        """The engine, loaded if it is not yet: its ``stats()``, ``plan`` and ``warm``."""
        return self._handle.get()

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of *text*."""
        return self.load().tokenizer(text, add_special_tokens=False)["input_ids"]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with the same engine."""
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        if self.engine is not None:
            self._handle.__getstate__()  # says why it cannot be
        return super().__getstate__()

    def _terms(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """On which terms the engine takes a request: the instance's, or the call's."""
        return {name: kwargs.get(name, getattr(self, name)) for name in _TERMS}

    def _sampling(self, stop: Iterable[str] | None, kwargs: Mapping[str, Any]) -> SamplingParams:
        """The instance's fields, overridden by the call's; stop strings of both."""
        own = {name: getattr(self, name, None) for name in (*_SAMPLING_FIELDS, *_LOGPROBS, "stop")}
        return merge_params(own, {**kwargs, "stop": stop})

    def _check_call(self, kwargs: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
        """Refuse what a call was given and nobody here knows."""
        known = {*SAMPLING_NAMES, *_LOGPROBS, *_TERMS, *_IGNORED_IN_CALLS, *taken}
        check_call(type(self).__name__, self.model, kwargs, known)

    def _tracing(self, kind: str, stop: Iterable[str] | None, kwargs: Mapping[str, Any]) -> LangSmithParams:
        params = self._sampling(stop, kwargs)
        tracing = LangSmithParams(
            ls_provider="layerstream",
            ls_model_name=kwargs.get("model", self.model),
            ls_model_type=kind,  # type: ignore[typeddict-item]
        )
        if params.temperature is not None:
            tracing["ls_temperature"] = params.temperature
        if params.max_tokens is not None:
            tracing["ls_max_tokens"] = params.max_tokens
        if params.stop:
            tracing["ls_stop"] = list(params.stop)
        return tracing


def check_stream(params: SamplingParams) -> None:
    """Refuse to stream several answers as one.

    Raises:
        ConfigurationError: ``n`` is more than 1.
    """
    if params.n > 1:
        raise ConfigurationError(f"n is {params.n}; a stream has one answer: ask for several with generate()")


def usage_of(completion: Completion, num_prompts: int = 1) -> dict[str, Any]:
    """LangChain's usage of a completion; *num_prompts* is 0 for the second of several answers to one prompt."""
    usage = completion.usage
    prompt_tokens, cached = usage.prompt_tokens * num_prompts, usage.cached_tokens * num_prompts
    return {
        "input_tokens": prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": prompt_tokens + usage.completion_tokens,
        "input_token_details": {"cache_read": cached},
    }


def logprobs_of(completion: Completion, engine: LayerStream) -> dict[str, Any] | None:
    """Log-probabilities in OpenAI's form; ``None`` where none were asked for."""
    return openai_logprobs(completion, engine.tokenizer.decode)


def add_usages(outputs: Iterable[Mapping[str, Any] | None], model: str) -> dict[str, Any]:
    """``llm_output`` of several answers: their usage, summed."""
    counts: Counter[str] = Counter()
    for output in outputs:
        counts.update((output or {}).get("token_usage", {}))
    return {"token_usage": dict(counts), "model_name": model}
