"""An engine that integrations share: loaded at first use, closed when nobody holds it.

Wrappers with the same model and options share one engine. Invariants: an engine is made at most once per key while
anybody holds a handle to it; the registry holds engines weakly, handles hold them strongly; an engine that was passed
in belongs to whoever made it and is never closed here (it closes itself when it is forgotten). Copies of a wrapper
share its handle; a pickle has the model's name and the options, and loads where it is unpickled.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.api.habits import hint_for
from layerstream.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

logger = logging.getLogger(__name__)

MODEL_VARIABLE = "LAYERSTREAM_MODEL"
ENGINE_OPTIONS = frozenset(
    {"allow_control_tokens", "allow_untested", "attention", "chunk_tokens", "cuda_graphs", "device", "device_map",
     "draft_model", "dtype", "host_compute", "host_memory", "kv_store", "max_context", "max_queued", "memory",
     "progress", "quantization", "recompute", "recompute_by",
     "reuse", "revision", "speculation", "token", "trust_remote_code"}
)  # fmt: skip
"""What :class:`~layerstream.LayerStream` takes beside the model."""
TERMS = ("timeout", "priority", "client", "tenant")
"""On which terms it takes a request: fields of every wrapper."""
CALL_TERMS = ("passages",)
"""What a call alone can say beside those."""
_lock = threading.Lock()
_loading: dict[str, threading.Lock] = {}
_engines: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _forget_parent() -> None:
    """A forked child begins without its parent's engines, and without locks that nobody there will release."""
    global _lock
    _lock = threading.Lock()
    _loading.clear()
    _engines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


def default_model() -> str:
    """The model that the environment names, else the bundled reader."""
    return os.environ.get(MODEL_VARIABLE) or "demo"


def check_fields(kind: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a wrapper's unknown fields, and say what they might have been meant for.

    Raises:
        ConfigurationError: names the field.
    """
    known = set(known)
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(f"{kind} has no field {name!r}{_suggest(name, value, known)}")


def check_call(kind: str, model: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse what a call was given and no wrapper knows.

    Raises:
        ConfigurationError: names the option.
    """
    known = set(known)
    for name, value in given.items():
        if name in ("model", "model_name") and value not in (None, model):
            raise ConfigurationError(f"this is {model!r}; another model is another {kind}(model={value!r})")
        if name not in known and name not in ("model", "model_name"):
            raise ConfigurationError(f"a call has no option {name!r}{_suggest(name, value, known)}")


def terms_of(wrapper: object, call: Mapping[str, Any]) -> dict[str, Any]:
    """On which terms the engine takes a request: the *call*'s, else the *wrapper*'s; of what a call alone can say, what
    it said (``passages=None`` says something)."""
    own = {name: call.get(name, getattr(wrapper, name)) for name in TERMS}
    return own | {name: call[name] for name in CALL_TERMS if name in call}


def _suggest(name: str, value: Any, known: Iterable[str]) -> str:
    hint = hint_for(name, value, known)
    if hint is not None:
        return f"; here: {hint}"
    if name in ENGINE_OPTIONS:
        return f"; it is the engine's: make the wrapper with engine_kwargs={{{name!r}: {value!r}}}"
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def peek_context_length(model: str) -> int | None:
    """Tokens of context as the model's own config says, if it is at hand; nothing is loaded."""
    from layerstream.checkpoint.reading import read_object

    folder = Path(__file__).parent / "demo" / "reader" if model == "demo" else Path(model)
    try:
        config = read_object(folder / "config.json")
        length = config.get("text_config", config).get("max_position_embeddings")
    except (CheckpointError, OSError, ValueError, AttributeError):
        return None
    return length if isinstance(length, int) else None


class EngineHandle:
    """Leads to an engine: one that is there, or one that is loaded when it is first asked for.

    Args:
        model: folder, hub id or ``"demo"``; ``None`` for :func:`default_model`.
        options: keyword arguments of :class:`~layerstream.LayerStream`.
        engine: an engine that is there already.
    """

    def __init__(
        self,
        model: str | None = None,
        options: Mapping[str, Any] | None = None,
        engine: LayerStream | None = None,
    ) -> None:
        self.model = engine.model_name if engine is not None else model or default_model()
        self._options = dict(options or {})
        self._given = self._engine = engine
        self._source = "an engine that was passed in" if engine is not None else self._describe_source(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._given is not None:
            raise TypeError(
                "a wrapper around an engine that was passed in cannot be pickled: make it with model= and "
                "engine_kwargs=, and the engine is loaded where it is unpickled"
            )
        return {**self.__dict__, "_engine": None}

    @property
    def is_loaded(self) -> bool:
        """Whether the engine is there."""
        return self._engine is not None

    @property
    def reuses_anywhere(self) -> bool:
        """Whether the engine moves passages; known before it is loaded."""
        return self._given.reuses_anywhere if self._given is not None else self._options.get("reuse") == "anywhere"

    def note_passages(self, texts: Iterable[str], tenant: str) -> None:
        """*texts* are about to stand in a prompt of *tenant*, as they are here: they are found in it and in later ones,
        where the engine moves passages. Nothing is loaded for it."""
        if self.reuses_anywhere:
            from layerstream.text.passages import SEEN

            SEEN.add(texts, tenant)

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on beside prompt and parameters; the same before the engine is loaded as after."""
        if self._given is not None:
            return self._given.identity
        return {"model": self.model, **self._options}

    async def get_async(self) -> LayerStream:
        """The engine; loaded on a thread, so that the event loop goes on."""
        if self._engine is not None:
            return self._engine
        import asyncio

        return await asyncio.to_thread(self.get)

    def get(self) -> LayerStream:
        """The engine; the first call loads it (callers on other threads wait for that one)."""
        if self._engine is None:
            key = json.dumps([self.model, self._options], sort_keys=True, default=repr)
            with _lock:
                loading = _loading.setdefault(key, threading.Lock())
            with loading:
                self._engine = _engines.get(key) or self._load(key)
        return self._engine

    def _load(self, key: str) -> LayerStream:
        from layerstream.engine import LayerStream

        logger.info("LayerStream runs %s (%s)", self.model, self._source)
        engine = LayerStream(self.model, **self._options)
        _engines[key] = engine
        return engine

    @staticmethod
    def _describe_source(model: str | None) -> str:
        if model:
            return "as asked for"
        return f"as {MODEL_VARIABLE} says" if os.environ.get(MODEL_VARIABLE) else "the bundled reader"
