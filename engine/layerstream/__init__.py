"""LayerStream: language models whose weights stream past the compute within a memory budget.

Importing this package is quick and needs no torch; a public name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerstream.airllm import AutoModel
    from layerstream.api.completion import Completion, CompletionMetrics, Delta, TokenLogprob, Usage
    from layerstream.api.params import SamplingParams
    from layerstream.api.reading import HiddenState, TokenLogits
    from layerstream.api.request import Request
    from layerstream.engine import LayerStream
    from layerstream.errors import (
        AnswerCutOff,
        BudgetTooSmall,
        CheckpointError,
        CheckpointNotFound,
        ConfigurationError,
        DeviceLost,
        DocumentError,
        EmptyPrompt,
        EngineClosed,
        GatedRepository,
        GrammarError,
        InvalidHeader,
        InvalidLogits,
        InvalidRouting,
        InvalidSamplingParams,
        InvalidSize,
        KVStoreUnusable,
        LayerStreamError,
        MissingExtra,
        MissingTensor,
        OutOfMemory,
        PromptError,
        PromptTooLong,
        QueueFull,
        ReadError,
        RequestTimeout,
        StorageFull,
        ToolError,
        TruncatedFile,
        UnsupportedFormat,
        UnsupportedModel,
        WaitsForItself,
    )
    from layerstream.stats import EngineStats
    from layerstream.store.config import KVStoreConfig
    from layerstream.text.passages import Passage, compose

__version__ = "0.2.0"

__all__ = [
    "AnswerCutOff",
    "AutoModel",
    "BudgetTooSmall",
    "CheckpointError",
    "CheckpointNotFound",
    "Completion",
    "CompletionMetrics",
    "ConfigurationError",
    "Delta",
    "DeviceLost",
    "DocumentError",
    "EmptyPrompt",
    "EngineClosed",
    "EngineStats",
    "GatedRepository",
    "GrammarError",
    "HiddenState",
    "InvalidHeader",
    "InvalidLogits",
    "InvalidRouting",
    "InvalidSamplingParams",
    "InvalidSize",
    "KVStoreConfig",
    "KVStoreUnusable",
    "LayerStream",
    "LayerStreamError",
    "MissingExtra",
    "MissingTensor",
    "OutOfMemory",
    "Passage",
    "PromptError",
    "PromptTooLong",
    "QueueFull",
    "ReadError",
    "Request",
    "RequestTimeout",
    "SamplingParams",
    "StorageFull",
    "TokenLogits",
    "TokenLogprob",
    "ToolError",
    "TruncatedFile",
    "UnsupportedFormat",
    "UnsupportedModel",
    "Usage",
    "WaitsForItself",
    "__version__",
    "compose",
]

_ELSEWHERE = {
    "AutoModel": "airllm",
    "Completion": "api.completion",
    "CompletionMetrics": "api.completion",
    "Delta": "api.completion",
    "EngineStats": "stats",
    "HiddenState": "api.reading",
    "KVStoreConfig": "store.config",
    "LayerStream": "engine",
    "Passage": "text.passages",
    "Request": "api.request",
    "SamplingParams": "api.params",
    "TokenLogits": "api.reading",
    "TokenLogprob": "api.completion",
    "Usage": "api.completion",
    "compose": "text.passages",
}
"""The module that a public name lives in; the names not here are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
