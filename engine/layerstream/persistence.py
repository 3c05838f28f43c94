"""From an engine's configuration to its prefix store: the fingerprint of what it computes, and the tier under it."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from layerstream.checkpoint.names import PackedSource
from layerstream.errors import KVStoreUnusable
from layerstream.kv import fingerprint
from layerstream.kv.choice import Rates
from layerstream.kv.codecs import CODECS
from layerstream.kv.config import KVStoreConfig
from layerstream.kv.fingerprint import WeightFiles
from layerstream.kv.state import LayerState
from layerstream.kv.store import PrefixStore
from layerstream.kv.tiers.folder import Bounds, StoreFolder
from layerstream.kv.tiers.local import LocalTier
from layerstream.machine import processor
from layerstream.model.attention import IMPLEMENTATION
from layerstream.model.skeleton import Skeleton
from layerstream.planner import Plan
from layerstream.streaming.reader import DirectReader

logger = logging.getLogger(__name__)

HOPED_READ_RATE = 3e9  # bytes per second, before one was measured: what is stored is then rather loaded than computed
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
    reader: DirectReader,
    computes: str,
    sweep_seconds: Callable[[], float],
) -> PrefixStore | None:
    """The store that *config* asks for.

    Args:
        computes: what computes, and how.
        sweep_seconds: what moving the streamed weights of a sweep takes.

    Returns:
        ``None`` where *is_default* and the folder cannot be used: nobody asked for it, so it is only logged.

    Raises:
        KVStoreUnusable: the folder cannot be a store.
    """
    try:
        store_folder = StoreFolder(config.path)
    except (KVStoreUnusable, OSError, sqlite3.Error) as error:
        if is_default:
            logger.warning("no KV store: %s", error)
            return None
        if isinstance(error, KVStoreUnusable):
            raise
        raise KVStoreUnusable(f"{config.path} cannot be used as a KV store: {error}") from error
    files = WeightFiles.of(weight_paths(skeleton))
    bounds = Bounds(config.bound(store_folder.total_bytes()), config.min_free)

    def open_tier(digests: list[str]) -> LocalTier:
        about = describe(config, folder, skeleton, plan, digests, computes)
        name = fingerprint.namespace(about, config.salt)
        return LocalTier(store_folder, name, {"model": model, "fingerprint": about}, bounds, reader)

    def open_later(is_stopped: Callable[[], bool]) -> LocalTier | None:
        taken = files.take_digests(store_folder.index, is_stopped)
        return None if taken is None else open_tier(taken)

    def rates() -> Rates:
        return Rates(reader.rate() or HOPED_READ_RATE, sweep_seconds(), plan.max_sweep_tokens)

    digests = None if store_folder.read_only else files.known_digests(store_folder.index)
    if digests is None and files.num_bytes <= HASHED_AT_ONCE:
        digests = files.take_digests(None if store_folder.read_only else store_folder.index)
    return PrefixStore(
        states,
        plan.page_tokens,
        CODECS[config.compression],
        rates,
        tier=None if digests is None else open_tier(digests),
        open_tier=open_later,
        is_current=files.is_unchanged,
        load=config.load,
        on_close=store_folder.close,
    )


def describe(
    config: KVStoreConfig, folder: Path, skeleton: Skeleton, plan: Plan, digests: Sequence[str], computes: str
) -> dict[str, Any]:
    """The fingerprint of the KV that this engine computes, with *computes*."""
    dtype = str(skeleton.dtype).removeprefix("torch.")
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
        },
        arithmetic=_arithmetic(skeleton, plan, computes) if config.exact else None,
    )


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
    quantised = {
        "codecs": sorted(codecs),
        "fused_rows": dict(sorted(plan.facts.fused_rows.items())),
        "staying": hashlib.sha256(repr(staying).encode()).hexdigest()[:16],
    }
    return {
        **(quantised if codecs else {}),
        "cuts": hashlib.sha256(repr(cut).encode()).hexdigest()[:16] if cut else "none",
        "device": computes,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
    }
