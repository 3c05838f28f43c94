"""What the caller chose, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from layerstream.api import arguments
from layerstream.core.formats import FORMATS
from layerstream.core.sizes import parse_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.accelerators import is_device_name
from layerstream.store.config import KVStoreConfig, store_config

CHUNK_CHOICES = (32, 64, 128, 256, 512)
REUSES = ("exact", "anywhere")
CHOICES = ("first", "deviation")
ATTENTIONS = ("auto", "sdpa", "flash_attn")
DEVICE_MAPS = ("auto", "balanced", "sequential")
MAX_QUEUED = 65536
"""Answers that may wait, if nobody says: a prompt of 1,000 tokens that waits takes some 20 kB."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine that is wanted.

    ``memory_each`` is the memory of each of several devices, where they do not have the same; ``reserved_bytes`` of the
    memory (of the first device) and ``reserved_host_bytes`` are a draft model's; ``packed`` is the model in the
    ``quantization`` asked for.

    Raises:
        ConfigurationError: a value that nothing can be done with.
    """

    model: str
    device: str = "auto"
    device_map: str | None = None
    memory_bytes: int | None = None
    memory_each: tuple[int, ...] = ()
    host_memory_bytes: int | None = None
    host_compute: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    cuda_graphs: bool = True
    max_context: int | None = None
    chunk_tokens: int | None = None
    reuse: str = "exact"
    recompute: str | float = "free"
    recompute_by: str = "first"
    max_queued: int | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    token: str | None = None
    allow_untested: bool = False
    allow_control_tokens: bool = False
    kv_store: KVStoreConfig | None = None
    kv_store_is_default: bool = False
    speculation: str = "auto"
    draft_model: str | None = None
    reserved_bytes: int = 0
    reserved_host_bytes: int = 0
    quantization: str | None = None
    packed: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not is_device_name(self.device):
            raise arguments.refusal("device", self.device, "'auto', 'cpu', 'cuda', 'cuda:1' and so on, or 'mps'")
        self._check_devices()
        arguments.one_of("attention", self.attention, ATTENTIONS)
        arguments.one_of("host_compute", self.host_compute, ("auto", "off"))
        arguments.one_of("speculation", self.speculation, ("auto", "off"))
        arguments.one_of("quantization", self.quantization, (None, *FORMATS))
        arguments.one_of("chunk_tokens", self.chunk_tokens, (None, *CHUNK_CHOICES))
        arguments.one_of("reuse", self.reuse, REUSES)
        arguments.one_of("recompute_by", self.recompute_by, CHOICES)
        object.__setattr__(self, "recompute", _recompute(self.recompute))
        arguments.text("dtype", self.dtype)
        for field in ("revision", "token", "draft_model"):
            if getattr(self, field) is not None:
                arguments.text(field, getattr(self, field), may_be_empty=False)
        for field in ("trust_remote_code", "allow_untested", "cuda_graphs"):
            arguments.flag(field, getattr(self, field))
        for field in ("max_context", "max_queued"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, arguments.whole_number(field, getattr(self, field), 1))
        if self.draft_model is not None and self.speculation == "off":
            raise ConfigurationError("draft_model is set and speculation is 'off': leave out one of the two")

    def _check_devices(self) -> None:
        arguments.one_of("device_map", self.device_map, (None, *DEVICE_MAPS))
        if self.device_map is not None and self.device not in {"auto", "cuda"}:
            raise ConfigurationError(
                f"device_map spreads layers over all CUDA devices, and device is {self.device!r}: leave it out, and "
                "choose among them with CUDA_VISIBLE_DEVICES"
            )
        if self.memory_each and self.device_map is None:
            raise ConfigurationError(
                "memory is a list, of a ceiling for each device: pass device_map='auto' with it, or one size"
            )


def _recompute(value: object) -> str | float:
    """Raises :class:`ConfigurationError`."""
    if value == "free":
        return "free"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise arguments.refusal("recompute", value, "'free', or a share of a passage's tokens between 0 and 1")


def as_config(
    model: str | Path,
    *,
    memory: int | str | Sequence[int | str] | None = None,
    host_memory: int | str | None = None,
    kv_store: str | Path | KVStoreConfig | None = "auto",
    draft_model: str | Path | None = None,
    max_queued: int | None = MAX_QUEUED,
    **chosen: Any,
) -> EngineConfig:
    """The configuration out of what :class:`~layerstream.LayerStream` is given: sizes and folders as people write them.

    Args:
        chosen: fields of the configuration, as they are.

    Raises:
        ConfigurationError: a value that nothing can be done with.
    """
    is_list = isinstance(memory, list | tuple)
    return EngineConfig(
        model=_model_name(model),
        memory_bytes=None if memory is None or is_list else parse_size(cast(Any, memory)),
        memory_each=_sizes(memory) if is_list else (),
        host_memory_bytes=None if host_memory is None else parse_size(host_memory),
        kv_store=store_config(kv_store),
        kv_store_is_default=isinstance(kv_store, str) and kv_store == "auto",
        draft_model=None if draft_model is None else _model_name(draft_model, "draft_model"),
        max_queued=max_queued,
        **chosen,
    )


def _sizes(memory: Sequence[int | str]) -> tuple[int, ...]:
    if not memory:
        raise arguments.refusal("memory", memory, "a size such as '3GiB', or one for each device")
    return tuple(map(parse_size, memory))


def _model_name(model: object, name: str = "model") -> str:
    """The model as a string.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str) or not model.strip() or "\0" in model:
        raise arguments.refusal(name, model, "a folder, a hub id, or 'demo' for the bundled reader")
    return model
