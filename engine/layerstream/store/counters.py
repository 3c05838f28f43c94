"""What a store did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from layerstream.store.connection import State


@dataclass(slots=True)
class StoreCounters:
    """What the store did so far."""

    loaded_tokens: int = 0
    declined_tokens: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    skipped_pages: int = 0
    written_snapshots: int = 0
    written_snapshot_bytes: int = 0
    skipped_snapshots: int = 0
    lost_pages: int = 0
    saved_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class KVStats:
    """What the prefix cache did since the engine started.

    Attributes:
        state: "ready"; "hashing" while the weights' digests are taken; "off": there is none, or it failed and is tried
            again; "unusable": for good. The log says why, as does ``reason``.
        hits: prompts that found a part of their KV, in memory or on disk.
        reused_tokens: prompt tokens whose KV was there.
        loaded_tokens: those among them that came from disk; ``loaded_bytes`` were read for them.
        recomputed_tokens: tokens that were on disk and that it was faster to compute again.
        written_bytes: written in ``written_pages`` pages and ``written_snapshots`` snapshots of recurrent layers;
            ``skipped_pages`` and ``skipped_snapshots`` were not, for want of room or time.
        loaded_snapshots: those that came from disk.
        loaded_snapshot_bytes, written_snapshot_bytes: their part of ``loaded_bytes`` and ``written_bytes``.
        lost_pages: found damaged or gone, and computed again; snapshots count as well.
        saved_seconds: what computing the loaded tokens would have cost, less what loading them did.
    """

    state: State = "off"
    reason: str = ""
    hits: int = 0
    reused_tokens: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    recomputed_tokens: int = 0
    written_pages: int = 0
    written_bytes: int = 0
    skipped_pages: int = 0
    loaded_snapshots: int = 0
    loaded_snapshot_bytes: int = 0
    written_snapshots: int = 0
    written_snapshot_bytes: int = 0
    skipped_snapshots: int = 0
    lost_pages: int = 0
    saved_seconds: float = 0.0
