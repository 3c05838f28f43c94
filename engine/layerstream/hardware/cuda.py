"""NVIDIA devices: streams are lanes, events are marks.

An early version ran on a card once; since then, what is above it has run on the pretended device of the tests only.
Under ROCm torch has the same calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Accelerator, EventMark, Found
from layerstream.hardware.waits import RefusingWaits

_PORTABLE = 1  # cudaHostRegisterPortable
_SIZE = 8192  # of the square matrix that is multiplied by: 128 MiB, larger than any cache
_REPEATS = 5


class _Stream:
    """A CUDA stream of *device*; ``None``: whichever is torch's current one there."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._own = stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self, *, timed: bool = False) -> EventMark:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return EventMark(event)

    def after(self, mark: EventMark) -> None:
        self._stream.wait_event(mark.event)


class CudaDevice:
    """An NVIDIA device, or an AMD one under ROCm, which is there."""

    def __init__(self, torch_device: torch.device) -> None:
        index = torch_device.index if torch_device.index is not None else torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        self.name = _name_of(self.torch_device)
        self._pool: Any = None
        self._captured: torch.cuda.Stream | None = None
        with self.use():
            self.compute = _Stream(self.torch_device, None)
            self.inward, self.outward = (
                _Stream(self.torch_device, torch.cuda.Stream(self.torch_device)) for _ in range(2)
            )

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Make it torch's current device."""
        with torch.cuda.device(self.torch_device):
            yield

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """From torch's allocator, so that the ceiling counts it."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def pin(self, arena: Arena) -> None:
        """By ``cudaHostRegister``, for all devices: torch's own pinned allocator rounds up to powers of two."""
        with self.use():
            code = _runtime().cudaHostRegister(arena.tensor.data_ptr(), arena.num_bytes, _PORTABLE)
        if int(code):
            raise ConfigurationError(
                f"the system does not let {format_size(arena.num_bytes)} of host memory be pinned (CUDA error "
                f"{int(code)}): pass a smaller host_memory, or raise the limit (ulimit -l; within WSL: .wslconfig)"
            )

    def unpin(self, arena: Arena) -> None:
        """By ``cudaHostUnregister``."""
        with self.use(), contextlib.suppress(RuntimeError):
            _runtime().cudaHostUnregister(arena.tensor.data_ptr())

    def limit(self, num_bytes: int) -> None:
        """By torch's allocator, which then raises ``OutOfMemoryError``."""
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.torch_device)

    def peak_bytes(self) -> int:
        """Reserved, with what the allocator holds in reserve."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    def free_unused(self) -> None:
        """The allocator's cache."""
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], None]] | None:
        """As a CUDA graph. All graphs have one pool of memory, from torch's allocator: they run one after the other.
        They are captured on a stream of their own, because torch's belongs to the device that was captured first."""
        with RefusingWaits(self.torch_device):
            run()
        if self._pool is None or self._captured is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._captured = torch.cuda.Stream(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(  # other threads go on
            graph, pool=self._pool, stream=self._captured, capture_error_mode="thread_local"
        )
        with torch.cuda.stream(torch.cuda.current_stream(self.torch_device)), capturing:  # torch's fails to come back
            found = run()
        return found, graph.replay

    def is_lost(self, error: BaseException) -> bool:
        """Errors of the driver stay with the process; running out of memory is none."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _runtime() -> Any:
    """CUDA's own calls, which torch gives no types to."""
    return torch.cuda.cudart()


class Cuda(Accelerator):
    """NVIDIA devices, or AMD's under ROCm."""

    name = "cuda"
    has_numbers = True
    is_automatic = True
    can_measure = True
    packages = frozenset({"flash_attn", "bitsandbytes", "flash", "efficient"})

    def num_devices(self) -> int:
        """None without a driver, or in a torch without CUDA."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def check(self, device: torch.device) -> None:
        """Says what is missing, or which devices there are."""
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            reason = (
                f"torch {torch.__version__} was built for {built}, but finds no device or no driver: 'layerstream "
                "doctor'"
                if built
                else f"torch {torch.__version__} was built without CUDA: install a build for your driver "
                "(pytorch.org/get-started)"
            )
            raise ConfigurationError(f"device is {str(device)!r}, and {reason}; or pass device='cpu'")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            names = ", ".join(f"'cuda:{index}'" for index in range(count))
            raise ConfigurationError(f"device is {str(device)!r}, and this machine has {names}")

    def open(self, device: torch.device) -> CudaDevice:
        """With lanes of its own."""
        return CudaDevice(device)

    def free_bytes(self, device: torch.device) -> int:
        """As the driver says."""
        return torch.cuda.mem_get_info(device)[0]

    def synchronize(self, device: torch.device) -> None:
        """All lanes."""
        torch.cuda.synchronize(device)

    def name_of(self, device: torch.device) -> str:
        """The card, and what it computes with."""
        return _name_of(device)

    def model_of(self, device: torch.device) -> str:
        """The card."""
        return torch.cuda.get_device_name(device)

    def product_seconds(self, device: torch.device, num_rows: int) -> float:
        """In fp16, the best of some; what that takes is given back."""
        best = float("inf")
        with torch.cuda.device(device):  # events are of the current one
            matrix, rows = (torch.zeros((n, _SIZE), dtype=torch.float16, device=device) for n in (_SIZE, num_rows))
            for _ in range(_REPEATS):
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                torch.mm(rows, matrix)
                ended.record()
                ended.synchronize()
                best = min(best, began.elapsed_time(ended) / 1e3)
            del matrix, rows
            torch.cuda.empty_cache()
        return best

    def beside_bytes(self, device: torch.device) -> int:
        """Of all processes, where several have something there."""
        free, total = torch.cuda.mem_get_info(device)
        return max(0, total - free - torch.cuda.memory_reserved(device))


def _name_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
