"""What both models have in common: how their tokens are drawn, and what they say of it."""

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
from layerstream.handle import CALL_TERMS, TERMS, check_call
from pydantic import Field, field_validator, model_validator

from langchain_layerstream._source import EngineSource

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens",
)  # fmt: skip
_LOGPROBS = ("logprobs", "top_logprobs")
_IGNORED_IN_CALLS = frozenset({"stream", "stream_usage", "strict", "ls_structured_output_format"})


class EngineFields(EngineSource):
    """The engine and how its tokens are drawn; ``None`` is the model's own default."""

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
    prompt_layout: PromptLayout = "as_given"
    """``"context_first"``: where a prompt has a labelled question and then a labelled, longer context, the question is
    moved behind it, so that the context's KV is found again. (``context_first(prompt)`` does it in a template.)"""
    streaming: bool = False
    """Answer ``invoke`` from a stream, so that callbacks hear every token."""
    max_retries: int | None = Field(default=None, exclude=True)
    """Taken because LangChain's models have it. Nothing is sent anywhere, so nothing is sent twice."""
    api_key: Any = Field(default=None, exclude=True, repr=False)
    """Taken because LangChain's models have it, and not used."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_a_list(cls, value: Any) -> Any:
        """One string may stand alone."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        """A value out of range is said now."""
        self._sampling(None, {})
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
            **({"tenant": self.tenant} if self.tenant else {}),
            "stop_strings": self.stop,  # "stop" would be overwritten by that of the call
        }

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of *text*."""
        return self.load().tokenizer(text, add_special_tokens=False)["input_ids"]

    def _sampling(self, stop: Iterable[str] | None, kwargs: Mapping[str, Any]) -> SamplingParams:
        """The instance's fields, overridden by the call's; stop strings of both."""
        own = {name: getattr(self, name, None) for name in (*_SAMPLING_FIELDS, *_LOGPROBS, "stop")}
        return merge_params(own, {**kwargs, "stop": stop})

    def _check_call(self, kwargs: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
        """Refuse what a call was given and nobody here knows."""
        known = {*SAMPLING_NAMES, *_LOGPROBS, *TERMS, *CALL_TERMS, *_IGNORED_IN_CALLS, *taken}
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
    details = {"cache_read": cached}
    if usage.blended_tokens:
        details["blended"] = usage.blended_tokens * num_prompts
    return {
        "input_tokens": prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": prompt_tokens + usage.completion_tokens,
        "input_token_details": details,
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
