"""How many decode rows a row block has on an accelerator where nothing streams: measured once for a card.

A block is computed in one shape whoever is in it. A large card multiplies 128 rows in the time that it takes to read
the matrix; on a small one so many take longer, and one sequence alone would wait for rows that are nobody's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from layerstream.hardware.accelerators import accelerator_of, is_there
from layerstream.hardware.remembered import Remembered, machine_name
from layerstream.planner import facts as assumed

logger = logging.getLogger(__name__)

VARIABLE = "LAYERSTREAM_DEVICE_ROWS"
TOLERANCE = 1.2  # times as long as few rows take


def device_rows(device: torch.device) -> int:
    """Rows of a block on *device*: it is remembered, because bits depend on it, and with them what the store keeps.

    Where the device is not there, or cannot be measured, as many as a large card has.
    """
    kind = accelerator_of(device)
    if kind is None or not kind.can_measure or not is_there(device):
        return assumed.DEVICE_ROWS

    def complete(known: dict[str, Any]) -> None:
        if known.get(name) not in (assumed.STREAMING_ROWS, assumed.DEVICE_ROWS):
            few, many = (kind.product_seconds(device, rows) for rows in (assumed.STREAMING_ROWS, assumed.DEVICE_ROWS))
            known[name] = assumed.DEVICE_ROWS if many <= TOLERANCE * few else assumed.STREAMING_ROWS
            logger.info(
                "%d decode rows take %.3f ms, %d take %.3f ms",
                assumed.STREAMING_ROWS,
                1e3 * few,
                assumed.DEVICE_ROWS,
                1e3 * many,
            )

    name = machine_name(device)
    file = Remembered.named(VARIABLE, "device_rows.json", lock_seconds=-1)  # others wait rather than measure at once
    try:
        return int(file.change(complete)[name])
    except OSError as error:
        logger.warning("%s cannot be written (%s): row blocks are measured anew by every process", file.path, error)
        known: dict[str, Any] = {}
        complete(known)
        return int(known[name])
