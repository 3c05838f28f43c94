"""The states of recurrent layers: what a layer keeps for a sequence, however long it is (convolutions, delta rules).

A *slot* is room for one state of every recurrent layer. Whoever computes reads the state before its rows from one slot
and writes the state after them to another, so a state that was committed never changes, and a sweep that fails leaves
nothing behind. Who holds which slot is decided in :mod:`layerstream.scheduling.states`; here is the memory alone.

Slots lie where their layer is computed: in host memory, or on the layer's device. There rows of a block go on at once,
so that one slot more takes what padding leaves (*nobody*); nobody reads it. Stores and swap files take and bring
them as pages of one token in bytes (:meth:`RecurrentLayer.page`, :meth:`RecurrentLayer.fill`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Device
from layerstream.kv.shape import PageShape, StateShape, rows_at_once


class RecurrentLayer:
    """The slots of one layer.

    Args:
        device: where the layer is computed; ``None``: on the processor.
    """

    def __init__(self, shape: StateShape, num_slots: int, device: Device | None = None) -> None:
        self._shape = shape
        self._num_slots = num_slots
        self._device = device
        num_slots += device is not None
        num_bytes = num_slots * shape.num_bytes
        memory = Arena(num_bytes).tensor[:num_bytes] if device is None else device.allocate(num_bytes)
        self._slots = memory.view(num_slots, -1)  # ``(slots, bytes)``; touched as slots fill
        self._parts: dict[int, dict[str, torch.Tensor]] = {}
        self._whole: dict[str, torch.Tensor] = {}

    @property
    def shape(self) -> PageShape:
        """As a page of one token."""
        return self._shape.page

    @property
    def device(self) -> torch.device | None:
        """Where it is computed; ``None``: on the processor."""
        return None if self._device is None else self._device.torch_device

    @property
    def nobody(self) -> int:
        """The slot, on a device, that is written to and never read."""
        return self._num_slots

    def rows_at_once(self, block_rows: int) -> int:
        """See :func:`~layerstream.kv.shape.rows_at_once`."""
        return rows_at_once(self._shape.num_bytes, block_rows)

    def slots(self, name: str) -> torch.Tensor:
        """``(slots and nobody's, *shape)``: the part *name* of all states, on a device."""
        if name not in self._whole:
            at = [part.name for part in self._shape.parts].index(name)
            part, start = self._shape.parts[at], self._shape.offsets[at]
            flat = self._slots[:, start : start + part.num_bytes].view(getattr(torch, part.dtype))
            self._whole[name] = flat.unflatten(1, part.shape)
        return self._whole[name]

    def parts(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of what *slot* has, by the name of the part, to read or to write."""
        found = self._parts.get(slot)
        if found is None:
            flat = self._slots[slot]
            found = self._parts[slot] = {
                part.name: flat[start : start + part.num_bytes].view(getattr(torch, part.dtype)).view(part.shape)
                for part, start in zip(self._shape.parts, self._shape.offsets, strict=False)
            }
        return found

    def reserve(self, shape: PageShape) -> None:
        """There is room for states of *shape*.

        Raises:
            ValueError: there is room for those of another shape.
        """
        if shape != self.shape:
            raise ValueError(f"states of {shape.key_width} bytes do not fit among those of {self.shape.key_width}")

    def page(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of *slot* in host memory ``(1, 1, bytes)``, and nothing ``(1, 1, 0)``; to be left as they are."""
        flat = self._slots[slot].view(1, 1, -1)
        return flat.cpu(), flat.new_empty((1, 1, 0), device="cpu")

    def fill(self, slot: int, decode: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Have *decode* write what :meth:`page` would give."""
        flat = self._slots[slot].view(1, 1, -1)
        if flat.is_cpu:
            decode(flat, flat[..., :0])
            return
        here = torch.empty_like(flat, device="cpu")
        decode(here, here[..., :0])
        flat.copy_(here)
