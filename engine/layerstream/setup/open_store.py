"""From an engine's configuration to its prefix store: the fingerprint of what it computes, and the tier under it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from layerstream.checkpoint.codecs import bnb_kernel
from layerstream.checkpoint.names import PackedSource
from layerstream.errors import KVStoreUnusable
from layerstream.hardware.machine import processor
from layerstream.hardware.reader import DirectReader
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.state import LayerState
from layerstream.model import scans
from layerstream.model.attention import IMPLEMENTATION
from layerstream.model.skeleton import Skeleton
from layerstream.model.traced import LayerTrace
from layerstream.planner import Plan
from layerstream.store import fingerprint
from layerstream.store.choice import Rates
from layerstream.store.codecs import CODECS
from layerstream.store.config import KVStoreConfig
from layerstream.store.fingerprint import DigestMemory, WeightFiles
from layerstream.store.leases import new_owner
from layerstream.store.store import PrefixStore
from layerstream.store.tiers.folder import Access, Bounds, StoreFolder, StoreUnavailable
from layerstream.store.tiers.local import LocalTier
from layerstream.store.tiers.opened import OpenSegments

logger = logging.getLogger(__name__)

HOPED_READ_RATE = 3e9  # bytes per second, before one was measured: what is stored is then rather loaded than computed
BUSY_SECONDS = 2.0  # for a process that writes to the index; after that it is off
HASHED_AT_ONCE = 256 * 2**20  # bytes of weights whose digest is taken before the engine starts: a tenth of a second


def open_store(
    config: KVStoreConfig,
    *,
    is_default: bool,
    model: str,
    folder: Path,
    skeleton: Skeleton,
    plan: Plan,
    states: Sequence[LayerState],
    recurrent: Sequence[RecurrentLayer],
    reader: DirectReader,
    computes: str,
    sweep_seconds: Callable[[], float],
) -> PrefixStore:
    """The store that *config* asks for.

    Args:
        computes: what computes, and how.
        is_default: nobody asked for it, so it is only logged if its folder cannot be used.
        sweep_seconds: what moving the streamed weights of a sweep takes.

    Raises:
        KVStoreUnusable: the folder cannot be a store, and it is not the default one. One whose disk is full, failing
            or read-only may be had later: the store is off until then.
    """
    files = WeightFiles.of(weight_paths(skeleton))

    def about(digests: list[str]) -> dict[str, Any]:
        return describe(config, folder, skeleton, plan, digests, computes)

    def rates() -> Rates:
        return Rates(reader.rate() or HOPED_READ_RATE, sweep_seconds(), plan.max_sweep_tokens)

    opener = _TierOpener(config, model, files, about, reader)
    tier, failure = None, None
    try:
        tier = opener.open_at_once()
    except (KVStoreUnusable, OSError, sqlite3.Error) as error:
        if isinstance(error, KVStoreUnusable) and not (is_default or isinstance(error, StoreUnavailable)):
            raise
        failure = error
    return PrefixStore(
        states,
        plan.page_tokens,
        CODECS[config.compression],
        rates,
        tier=tier,
        open_tier=opener.open,
        is_current=files.is_unchanged,
        recurrent=recurrent,
        load=config.load,
        failure=failure,
    )


class _TierOpener:
    """Opens the local tier of an engine, as often as it has to be.

    What is known of the weights, who takes leases and what is open stay the same.

    Args:
        about: the fingerprint, from the digests of *files*.
    """

    def __init__(
        self,
        config: KVStoreConfig,
        model: str,
        files: WeightFiles,
        about: Callable[[list[str]], dict[str, Any]],
        reader: DirectReader,
    ) -> None:
        self._config = config
        self._model = model
        self._files = files
        self._about = about
        self._reader = reader
        self._owner = new_owner()
        self._digests: list[str] | None = None
        self._opened: OpenSegments | None = None
        self._has_opened = False

    def open_at_once(self) -> LocalTier | None:
        """The tier, unless hashing the weights takes longer than the engine should wait."""
        folder = self._open_folder()
        try:
            self._digests = self._files.known_digests(folder.index)
        except BaseException:
            folder.close()
            raise
        if self._digests is None and self._files.num_bytes > HASHED_AT_ONCE:
            folder.close()
            return None
        return self._tier(folder, lambda: False)

    def open(self, is_stopped: Callable[[], bool]) -> LocalTier | None:
        """The tier; ``None`` if *is_stopped*, or the weights are not those that the engine has."""
        return self._tier(self._open_folder(), is_stopped)

    def _open_folder(self) -> StoreFolder:
        access = Access(self._owner, BUSY_SECONDS, is_suspect=self._has_opened)
        return StoreFolder(self._config.path, access)

    def _tier(self, folder: StoreFolder, is_stopped: Callable[[], bool]) -> LocalTier | None:
        try:
            if self._digests is None:
                self._digests = self._files.take_digests(_Digests(folder.index), is_stopped)
            if self._digests is None:
                folder.close()
                return None
            about = self._about(self._digests)
            name = fingerprint.namespace(about, self._config.salt)
            bounds = Bounds(self._config.bound(folder.total_bytes()), self._config.min_free)
            if not folder.read_only:
                folder.index.leases.give_back()  # of before a failure
            described = {"model": self._model, "fingerprint": about}
            tier = LocalTier(folder, name, described, bounds, self._reader, self._opened)
        except BaseException:
            folder.close()
            raise
        self._opened, self._has_opened = tier.opened, True
        if folder.read_only:
            logger.warning("the KV store %s is read-only: what is there is used, nothing is stored", folder.path)
        return tier


class _Digests:
    """Remembers digests where that is possible: a minute's hashing is not lost to a full disk."""

    def __init__(self, memory: DigestMemory) -> None:
        self._memory = memory

    def digest(self, path: Path, stat: os.stat_result) -> str | None:
        """The digest of *path*, if it is known for exactly this file."""
        return self._memory.digest(path, stat)

    def remember_digest(self, path: Path, stat: os.stat_result, sha256: str) -> None:
        """Remember it."""
        try:
            self._memory.remember_digest(path, stat, sha256)
        except (OSError, sqlite3.Error) as error:
            logger.info("the digest of %s is not remembered: %s", path, error)


def describe(
    config: KVStoreConfig, folder: Path, skeleton: Skeleton, plan: Plan, digests: Sequence[str], computes: str
) -> dict[str, Any]:
    """The fingerprint of the KV that this engine computes, with *computes*."""
    dtype = str(skeleton.dtype).removeprefix("torch.")
    recurrent = {"scans": scans.identity()} if skeleton.trace.recurrent else {}
    return fingerprint.describe(
        weights=[*digests, *_code_digests(folder, skeleton)],
        config=skeleton.config.to_dict(),
        layout={
            "dtype": dtype,
            "kv_dtype": dtype,
            "page_tokens": plan.page_tokens,
            "compression": config.compression,
            "attention": IMPLEMENTATION,
            "context": plan.facts.context_length,
            "layers": [_said(layer) for layer in skeleton.trace.layers],
            **recurrent,
        },
        arithmetic=_arithmetic(skeleton, plan, computes) if config.exact else None,
    )


def _said(layer: LayerTrace) -> str:
    """What *layer* caches, attends to and sees, and the state that it keeps."""
    kept = None if layer.kept is None else dataclasses.astuple(layer.kept)
    state = "" if layer.recurrent is None else f", recurrent {dataclasses.astuple(layer.recurrent.shape)}"
    return f"{kept}, state {layer.state}, window {layer.window}, chunk {layer.chunk}, expands {layer.expands}{state}"


def weight_paths(skeleton: Skeleton) -> list[Path]:
    """The files that parameters come from."""
    return sorted({piece.entry.extent.path for source in skeleton.sources.values() for piece in source.pieces})


def _code_digests(folder: Path, skeleton: Skeleton) -> list[str]:
    """Of a model's own code, where it brings some."""
    if not type(skeleton.model).__module__.startswith("transformers_modules"):
        return []
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))]


def _arithmetic(skeleton: Skeleton, plan: Plan, computes: str) -> dict[str, Any]:
    """What makes sums round otherwise."""
    cut = [(unit.module, *unit.rows) for unit in plan.weights.body if unit.rows is not None]
    codecs = {source.codec.name for source in skeleton.sources.values() if isinstance(source, PackedSource)}
    staying = [(u.name, u.stays_decoded) for i, u in enumerate(plan.weights.units) if i in plan.weights.residents]
    quantised: dict[str, Any] = {
        "codecs": sorted(codecs),
        "fused_rows": dict(sorted(plan.facts.fused_rows.items())),
        "staying": hashlib.sha256(repr(staying).encode()).hexdigest()[:16],
    }
    if plan.facts.is_on_device and codecs & {"nf4", "fp4"}:  # whose product rounds as it likes
        quantised["bitsandbytes"] = bnb_kernel.version()
    return {
        **(quantised if codecs else {}),
        "cuts": hashlib.sha256(repr(cut).encode()).hexdigest()[:16] if cut else "none",
        "device": computes,
        "chunk_tokens": plan.chunk_tokens,
        "prompt_rows": plan.prompt_rows,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
    }
