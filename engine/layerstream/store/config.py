"""Where and how KV outlives the process: :class:`KVStoreConfig`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerstream.api import arguments
from layerstream.core.sizes import parse_size
from layerstream.hardware.machine import cache_folder

VARIABLE = "LAYERSTREAM_KV_STORE"
DEFAULT_BYTES = 20 * 10**9
DEFAULT_SHARE = 0.1  # of the free space
COMPRESSIONS = ("none", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class KVStoreConfig:
    """The persistent prefix KV store of an engine.

    Attributes:
        folder: ``None``: what ``LAYERSTREAM_KV_STORE`` names, else ``layerstream/kv`` in the user's cache folder.
        max_bytes: ceiling for everything in the folder; ``None``: the smaller of 20 GB and a tenth of the free space.
        min_free_bytes: what must stay free on the disk.
        compression: ``"none"``: what was stored comes back bit for bit; ``"int8"`` and ``"fp8"``: half of bf16's
            bytes, and answers that may differ.
        salt: separates tenants: pages stored under one salt are not found under another. It comes from whoever runs
            the program, never from a request.
        exact: whether warm answers must be bit for bit the cold ones. ``False`` also takes pages that another
            processor, thread count or version of torch has computed.
        answers: whether answers are remembered beside the prefixes that they followed, to guess from.
        load: ``"auto"``: load or recompute, whichever is faster; ``"always"``; ``"never"``.
    """

    folder: str | Path | None = None
    max_bytes: int | str | None = None
    min_free_bytes: int | str = "1GiB"
    compression: Literal["none", "int8", "fp8"] = "none"
    salt: str = ""
    exact: bool = True
    load: Literal["auto", "always", "never"] = "auto"
    answers: bool = True

    def __post_init__(self) -> None:
        arguments.one_of("KVStoreConfig.compression", self.compression, COMPRESSIONS)
        arguments.one_of("KVStoreConfig.load", self.load, ("auto", "always", "never"))
        arguments.text("KVStoreConfig.salt", self.salt)
        arguments.flag("KVStoreConfig.exact", self.exact)
        arguments.flag("KVStoreConfig.answers", self.answers)
        if self.max_bytes is not None:
            parse_size(self.max_bytes)
        if self.min_free_bytes != 0:
            parse_size(self.min_free_bytes)

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder).expanduser() if self.folder is not None else default_folder()

    @property
    def min_free(self) -> int:
        """Bytes that must stay free."""
        return 0 if self.min_free_bytes == 0 else parse_size(self.min_free_bytes)

    def bound(self, stored_bytes: int) -> int:
        """Ceiling in bytes, where *stored_bytes* are in the folder already."""
        if self.max_bytes is not None:
            return parse_size(self.max_bytes)
        existing = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        return min(DEFAULT_BYTES, int(DEFAULT_SHARE * (shutil.disk_usage(existing).free + stored_bytes)))


def default_folder() -> Path:
    """Where the store is if nothing else is said."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    return cache_folder() / "kv"


def store_config(kv_store: object) -> KVStoreConfig | None:
    """What the engine's ``kv_store`` argument means: ``"auto"``, ``None``, a folder or a :class:`KVStoreConfig`.

    ``LAYERSTREAM_KV_STORE=off`` switches ``"auto"`` off.
    """
    if kv_store is None:
        return None
    if isinstance(kv_store, KVStoreConfig):
        return kv_store
    if isinstance(kv_store, str) and kv_store == "auto":
        return None if os.environ.get(VARIABLE, "").lower() in {"off", "none", "0"} else KVStoreConfig()
    if isinstance(kv_store, str | Path) and str(kv_store):
        return KVStoreConfig(folder=kv_store)
    raise arguments.refusal("kv_store", kv_store, "'auto', None, a folder or a KVStoreConfig")
