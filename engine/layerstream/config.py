"""What the caller chose, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from layerstream.checkpoint.codecs.encode import KINDS
from layerstream.errors import ConfigurationError
from layerstream.kv.config import KVStoreConfig

CHUNK_CHOICES = (32, 64, 128, 256, 512)
ATTENTIONS = ("auto", "sdpa", "flash_attn")
DEVICE_MAPS = ("auto", "balanced", "sequential")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


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
    max_context: int | None = None
    chunk_tokens: int | None = None
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
        if not _DEVICE.fullmatch(self.device):
            raise ConfigurationError(
                f"device is {self.device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1' and so on, or 'mps'"
            )
        self._check_devices()
        if self.attention not in ATTENTIONS:
            raise ConfigurationError(
                f"attention is {self.attention!r}; expected one of {', '.join(map(repr, ATTENTIONS))}"
            )
        if self.host_compute not in {"auto", "off"}:
            raise ConfigurationError(f"host_compute is {self.host_compute!r}; expected 'auto' or 'off'")
        if self.max_context is not None and self.max_context < 1:
            raise ConfigurationError(f"max_context is {self.max_context}; expected a number of tokens >= 1")
        if self.speculation not in {"auto", "off"}:
            raise ConfigurationError(f"speculation is {self.speculation!r}; expected 'auto' or 'off'")
        if self.draft_model is not None and self.speculation == "off":
            raise ConfigurationError("draft_model is set and speculation is 'off': leave out one of the two")
        if self.quantization not in {None, *KINDS}:
            raise ConfigurationError(
                f"quantization is {self.quantization!r}; expected None, {', '.join(map(repr, KINDS))}"
            )
        if self.chunk_tokens is not None and self.chunk_tokens not in CHUNK_CHOICES:
            raise ConfigurationError(f"chunk_tokens is {self.chunk_tokens!r}; expected one of {CHUNK_CHOICES}")

    def _check_devices(self) -> None:
        if self.device_map not in {None, *DEVICE_MAPS}:
            raise ConfigurationError(
                f"device_map is {self.device_map!r}; expected None or one of {', '.join(map(repr, DEVICE_MAPS))}"
            )
        if self.device_map is not None and self.device not in {"auto", "cuda"}:
            raise ConfigurationError(
                f"device_map spreads layers over all CUDA devices, and device is {self.device!r}: leave it out, and "
                "choose among them with CUDA_VISIBLE_DEVICES"
            )
        if self.memory_each and self.device_map is None:
            raise ConfigurationError(
                "memory is a list, of a ceiling for each device: pass device_map='auto' with it, or one size"
            )
