"""What happens while the engine works, as values; rendering is somebody else's business.

Listeners are called on the engine's threads: they must be quick and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Resident weights are being read."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PackProgress:
    """The model is converted to fewer bits, once: *done* of *total* files."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class SweepStarted:
    """A sweep begins; *num_units* units will pass."""

    index: int
    num_units: int
    num_tokens: int
    num_sequences: int
    streamed_bytes: int


@dataclass(frozen=True, slots=True)
class UnitFinished:
    """Unit *unit* (counted from 0) has been computed."""

    unit: int
    num_units: int
    done_bytes: int


@dataclass(frozen=True, slots=True)
class SweepFinished:
    """A sweep ended; *tokens_out* tokens came out of it."""

    index: int
    seconds: float
    tokens_out: int
    streamed_bytes: int


@dataclass(frozen=True, slots=True)
class EngineIdle:
    """No request is left."""


Event: TypeAlias = LoadProgress | PackProgress | SweepStarted | UnitFinished | SweepFinished | EngineIdle
Listener: TypeAlias = Callable[[Event], None]
