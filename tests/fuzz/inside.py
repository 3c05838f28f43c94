"""The one place where the fuzzer looks into an engine."""

from __future__ import annotations

import time
from pathlib import Path

from layerstream import LayerStream
from layerstream.store.segment import SUFFIX

SECONDS = 30.0  # in which what was cancelled is gone


def check_idle(engine: LayerStream) -> None:
    """Raise ``AssertionError`` unless *engine*, which has answered everybody, has nothing left over."""
    scheduler = engine._parts.scheduler
    give_up = time.monotonic() + SECONDS
    while (scheduler.num_running or scheduler.num_waiting) and time.monotonic() < give_up:
        time.sleep(0.005)
    assert not scheduler.num_running, f"{scheduler.num_running} sequences run, and nobody waits for them"
    assert not scheduler.num_waiting, f"{scheduler.num_waiting} sequences wait, and nobody for them"
    scheduler.check_integrity()


def segments(store: Path) -> list[Path]:
    """The files that *store* keeps keys and values in."""
    return sorted(path for path in store.rglob("*") if path.is_file() and path.suffix == SUFFIX)
