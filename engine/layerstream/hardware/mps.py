"""Apple devices, through Metal. Written after torch's documentation; it never ran on one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from layerstream.errors import ConfigurationError
from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Accelerator, EventMark, Found, is_out_of_memory


class _Queue:
    """The one queue that an Apple device has: all lanes are the same, so that whatever waits has what it waits for."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self, *, timed: bool = False) -> EventMark:
        event = torch.mps.Event(enable_timing=timed)
        event.record()
        return EventMark(event)

    def after(self, mark: EventMark) -> None:
        mark.event.wait()


class MpsDevice:
    """An Apple device.

    Its memory is the host's, so nothing is pinned, and copies and compute take turns in one queue.
    """

    def __init__(self) -> None:
        self.torch_device = torch.device("mps", 0)
        self.name = "mps"
        self.compute = self.inward = self.outward = _Queue()

    def use(self) -> contextlib.AbstractContextManager[None]:
        """There is only one."""
        return contextlib.nullcontext()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """From torch's allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def pin(self, arena: Arena) -> None:
        """Nothing: the memory is one."""

    def unpin(self, arena: Arena) -> None:
        """Nothing."""

    def limit(self, num_bytes: int) -> None:
        """By torch's allocator, as a share of what Metal recommends."""
        torch.mps.set_per_process_memory_fraction(min(2.0, num_bytes / torch.mps.recommended_max_memory()))

    def peak_bytes(self) -> int:
        """What Metal has given now: no peak is kept."""
        return torch.mps.driver_allocated_memory()

    def free_unused(self) -> None:
        """The allocator's cache."""
        torch.mps.empty_cache()

    def capture(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], None]] | None:
        """Metal records nothing."""
        return None

    def is_lost(self, error: BaseException) -> bool:
        """Metal says so in words."""
        return not is_out_of_memory(error) and "MPSCommandBuffer" in str(error)


class Mps(Accelerator):
    """Apple's devices; a machine has one."""

    name = "mps"

    def num_devices(self) -> int:
        """One, or none in a torch without Metal."""
        return int(torch.backends.mps.is_available())

    def check(self, device: torch.device) -> None:
        """Says that there is none."""
        if not torch.backends.mps.is_available():
            raise ConfigurationError("device is 'mps', and torch finds no Apple device here: pass device='cpu'")

    def open(self, device: torch.device) -> MpsDevice:
        """The one."""
        return MpsDevice()

    def free_bytes(self, device: torch.device) -> int:
        """Of what Metal recommends to take."""
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()

    def synchronize(self, device: torch.device) -> None:
        """The queue."""
        torch.mps.synchronize()
