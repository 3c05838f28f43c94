"""What an answer took, in lines of at most 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerstream.core.sizes import format_size

if TYPE_CHECKING:
    from layerstream.stats import EngineStats


def describe_work(before: EngineStats, after: EngineStats) -> str:
    """Sweeps, tokens and bytes between two readings of an engine's counters, and what the budget held."""
    sweeps = after.sweeps - before.sweeps
    tokens = after.tokens_in - before.tokens_in
    streamed = after.weight_bytes_streamed - before.weight_bytes_streamed
    reused = after.kv.reused_tokens - before.kv.reused_tokens
    cached = f" + {reused:,} cached" if reused else ""
    return (
        f"{sweeps} sweep{'s' * (sweeps != 1)} · {tokens:,} tokens{cached} · {format_streamed(streamed)} streamed"
        f" · plan {format_size(after.planned_memory_bytes)} of {format_size(after.budget_bytes)}"
    )


def format_seconds(seconds: float) -> str:
    """``"12 ms"``, ``"3.4 s"``, ``"2 min 5 s"``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def format_streamed(num_bytes: int) -> str:
    """Decimal, as disks are sold: ``"31 MB"``, ``"5.1 GB"``."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
