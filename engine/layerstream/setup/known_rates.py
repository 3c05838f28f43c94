"""What is known of this machine's rates, in a file; the best of what was seen counts.

A machine that was busy when it was measured looks slow. So it is measured by the first few forecasts, not by the first
alone, and whatever was fastest is kept; and an engine whose sweeps took less than its rates allow says so when it is
closed. The file is the one that ``LAYERSTREAM_RATES`` names, else it is in the user's cache folder. Any process may
write it: under a lock, with what others wrote in the meantime.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from layerstream.hardware.accelerators import PROCESSOR, accelerator_of
from layerstream.hardware.files import write_whole
from layerstream.hardware.machine import cache_folder, processor
from layerstream.planner import Plan
from layerstream.planner.forecast import Forecast
from layerstream.planner.rates import Rates

logger = logging.getLogger(__name__)

VARIABLE = "LAYERSTREAM_RATES"
LOCK_SECONDS = 10.0


def machine_name(device: torch.device) -> str:
    """What the rates depend on."""
    kind = accelerator_of(device)
    name = PROCESSOR if kind is None else kind.model_of(device)
    facts = [processor(), name, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.__version__]
    return f"{facts[0]}, {name}, {facts[3]} threads, {hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def disk_name(file: Path) -> str:
    """The disk that *file* is on."""
    return f"disk {file.stat().st_dev}"


class KnownRates:
    """The file; whatever is wrong with it counts as nothing known."""

    def __init__(self) -> None:
        self._path = Path(os.environ.get(VARIABLE) or cache_folder() / "machine.json").expanduser()
        self._known = self._read()

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
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                known = self._read()
                machines, disks = (_table(known.get(key)) for key in ("machines", "disks"))
                machines[name] = rates.as_json()
                if disk is not None:
                    disks[disk] = rates.disk
                known = {"machines": machines, "disks": disks}
                write_whole(self._path, json.dumps(known, indent=1))
                self._known = known
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next forecast measures again", self._path, error)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return _table(known)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
