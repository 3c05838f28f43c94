"""Host memory behind an accelerator: units that stay there, and a ring that the others pass through from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import torch

from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Device
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.feed import ReadFeed
from layerstream.streaming.layout import UnitLayout
from layerstream.streaming.loader import load_images


class HostSource:
    """The units of *layouts*, in pinned memory when they are taken.

    Args:
        residents: those that stay; they are read now.
        ring_bytes: for the others.
        on_load: told the bytes of each finished read of a resident.
    """

    def __init__(
        self,
        device: Device,
        layouts: Sequence[UnitLayout],
        residents: Set[int],
        ring_bytes: int,
        reader: DirectReader,
        on_load: Callable[[int], None] | None = None,
    ) -> None:
        self._device = device
        self._pinned: list[Arena] = []
        staged = [unit for unit in range(len(layouts)) if unit not in residents]
        self._places = {unit: place for place, unit in enumerate(staged)}
        self._ring: ReadFeed | None = None
        self._residents: dict[int, torch.Tensor] = {}
        try:
            if staged:
                ring_bytes = max(ring_bytes, max(layouts[unit].num_bytes for unit in staged))
                self._ring = ReadFeed([layouts[unit] for unit in staged], ring_bytes, reader)
                self._pin(self._ring.arena)
            if residents:
                kept = sorted(residents)
                _, images = load_images([layouts[unit] for unit in kept], reader, on_load, self._pin)
                self._residents = dict(zip(kept, images, strict=True))
        except BaseException:
            self.close()
            raise

    def stays(self, unit: int) -> bool:
        """Whether *unit* never leaves host memory."""
        return unit in self._residents

    def want(self, units: Iterable[int]) -> None:
        """Have *units* read, those that come from disk, after what is wanted already."""
        if self._ring is not None:
            self._ring.want(self._places[unit] for unit in units if unit in self._places)

    def is_there(self, unit: int) -> bool:
        """Whether :meth:`take` would return, or raise, at once."""
        return unit in self._residents or (self._ring is not None and self._ring.is_there(self._places[unit]))

    def take(self, unit: int) -> torch.Tensor:
        """Wait until *unit* is in host memory: ``(num_bytes,)`` uint8, until it is released."""
        if unit in self._residents:
            return self._residents[unit]
        assert self._ring is not None, "a unit is resident on the host or comes from disk"
        return self._ring.take(self._places[unit])

    def release(self, unit: int) -> None:
        """Its place in the ring is free for the next."""
        if self._ring is not None and unit in self._places:
            self._ring.release(self._places[unit])

    def interrupt(self, error: Exception) -> None:
        """Make the present or next :meth:`take` from disk raise *error*, until :meth:`abort`."""
        if self._ring is not None:
            self._ring.interrupt(error)

    def abort(self) -> None:
        """Wait for what is being read, empty the ring."""
        if self._ring is not None:
            self._ring.abort()

    def close(self) -> None:
        """Unpin. Idempotent."""
        self.abort()
        for arena in self._pinned:
            self._device.unpin(arena)
        self._pinned = []

    def _pin(self, arena: Arena) -> None:
        self._device.pin(arena)
        self._pinned.append(arena)
