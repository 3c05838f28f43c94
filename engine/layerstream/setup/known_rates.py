"""What is known of this machine's rates, in a file; the best of what was seen counts.

A machine that was busy when it was measured looks slow. So it is measured by the first few forecasts, not by the first
alone, and whatever was fastest is kept; and an engine whose sweeps took less than its rates allow says so when it is
closed. The file is the one that ``LAYERSTREAM_RATES`` names, else it is in the user's cache folder. Any process may
write it: under a lock, with what others wrote in the meantime.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from layerstream.hardware.remembered import Remembered, machine_name, table
from layerstream.planner import Plan
from layerstream.planner.forecast import Forecast
from layerstream.planner.rates import Rates

logger = logging.getLogger(__name__)

VARIABLE = "LAYERSTREAM_RATES"


def disk_name(file: Path) -> str:
    """The disk that *file* is on."""
    return f"disk {file.stat().st_dev}"


class KnownRates:
    """The file; whatever is wrong with it counts as nothing known."""

    def __init__(self) -> None:
        self._file = Remembered.named(VARIABLE, "machine.json")
        self._known = self._file.read()

    def rates(self, name: str) -> Rates | None:
        """Those of the machine *name*."""
        try:
            return Rates.from_json(self._known["machines"][name])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def disk(self, name: str) -> float | None:
        """Bytes per second of the disk *name*."""
        try:
            return float(self._known["disks"][name])
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, name: str, rates: Rates, disk: str | None = None) -> None:
        """Remember those of the machine *name*, and that of the *disk* that they are with."""

        def change(known: dict[str, Any]) -> None:
            known["machines"] = table(known.get("machines")) | {name: rates.as_json()}
            known["disks"] = table(known.get("disks")) | ({} if disk is None else {disk: rates.disk})

        try:
            self._known = self._file.change(change)
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next forecast measures again", self._file.path, error)


def correct(plan: Plan, dtype: str, block_seconds: float) -> None:
    """The processor computed a sweep of *plan* with one row block, which decodes, for *block_seconds*: where that is
    less than the known rates allow, they are faster by as much. Where none are known, nothing."""
    known, name = KnownRates(), machine_name(torch.device("cpu"))
    rates = known.rates(name)
    if rates is None or dtype not in rates.products:
        return
    expected = Forecast(plan, rates, dtype).decode_seconds
    if 0.0 < block_seconds < expected:
        known.write(name, rates.sped_up(expected / block_seconds))
