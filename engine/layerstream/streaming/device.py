"""A compute device with memory of its own, as the pipeline sees it: memory, lanes and marks.

A *lane* is a queue of work that the device does in order (a CUDA stream); lanes run beside each other and beside the
host. A *mark* is a place in a lane (an event): another lane can be made to wait for it without stopping anybody else,
and the host may wait for it too. There is no other ordering, and nothing in a sweep synchronises the whole device.

| lane | what runs there | thread that fills it |
|---|---|---|
| ``compute`` | the model | the engine's |
| ``inward`` | units and KV pages, host to device | the copier's, and the engine's for pages |
| ``outward`` | new KV rows, device to host | the engine's |

The processor is no :class:`Device`: weights and pages are where it computes. Where several devices compute, each has
lanes of its own; a tensor that goes from one to another is torch's business, which makes the compute lane of the one
wait for that of the other.

| device | untested because there was none |
|---|---|
| :class:`CudaDevice` | on a real card; under ROCm, whose calls in torch are the same |
| :class:`MpsDevice` | on a real Mac |
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from layerstream.errors import ConfigurationError
from layerstream.sizes import format_size
from layerstream.streaming.ring import Arena

logger = logging.getLogger(__name__)


class Mark(Protocol):
    """A place in a lane."""

    def wait(self) -> None:
        """Stop the calling thread until the device has come here."""
        ...

    def is_reached(self) -> bool:
        """Whether it has."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Device time between two marks that both were made with ``timed`` and reached."""
        ...


class Lane(Protocol):
    """A queue of work."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy *source* to *target*, in turn; the host's side is pinned and is left alone until a later mark."""
        ...

    def mark(self, *, timed: bool = False) -> Mark:
        """The place that the queue has come to by now."""
        ...

    def after(self, mark: Any) -> None:
        """What is queued from here on waits for *mark*, of another lane."""
        ...


class Device(Protocol):
    """One accelerator."""

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def name(self) -> str:
        """What its arithmetic depends on."""
        ...

    @property
    def compute(self) -> Lane:
        """What torch's operators on the engine's thread queue to."""
        ...

    @property
    def inward(self) -> Lane:
        """Host to device."""
        ...

    @property
    def outward(self) -> Lane:
        """Device to host."""
        ...

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Entered by every thread around what it does with the device."""
        ...

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """``(num_bytes,)`` uint8 on the device, for the life of the engine."""
        ...

    def pin(self, arena: Arena) -> None:
        """Let the device copy from and to *arena* without the processor.

        Raises:
            ConfigurationError: the system does not let so much memory be pinned.
        """
        ...

    def unpin(self, arena: Arena) -> None:
        """Undo :meth:`pin`; nothing may be under way."""
        ...

    def limit(self, num_bytes: int) -> None:
        """From now on allocations past *num_bytes* altogether fail, as if the device had no more."""
        ...

    def peak_bytes(self) -> int:
        """Most that was reserved of the device's memory at a time, by this process's allocator."""
        ...

    def free_unused(self) -> None:
        """Give back what the allocator holds in reserve."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether *error* means that the device will not compute again in this process."""
        ...


class _Event:
    """A CUDA event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def is_reached(self) -> bool:
        return self.event.query()

    def seconds_since(self, earlier: _Event) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3


class _Stream:
    """A CUDA stream of *device*; ``None``: whichever is torch's current one there."""

    def __init__(self, module: Any, device: torch.device, stream: Any) -> None:
        self._module = module
        self._device = device
        self._own = stream

    @property
    def _stream(self) -> Any:
        return self._own if self._own is not None else self._module.current_stream(self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self, *, timed: bool = False) -> _Event:
        event = self._module.Event(enable_timing=timed)
        event.record(self._stream)
        return _Event(event)

    def after(self, mark: _Event) -> None:
        self._stream.wait_event(mark.event)


_PORTABLE = 1  # cudaHostRegisterPortable


class CudaDevice:
    """An NVIDIA device, or an AMD one under ROCm (the same calls in torch; not tested there).

    Raises:
        ConfigurationError: there is no such device, or torch was built without it.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._module: Any = torch.cuda
        _check_cuda(torch_device)
        index = torch_device.index if torch_device.index is not None else torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        self.name = device_name(self.torch_device)
        with self.use():
            self.compute = _Stream(self._module, self.torch_device, None)
            self.inward, self.outward = (
                _Stream(self._module, self.torch_device, self._module.Stream(self.torch_device)) for _ in range(2)
            )

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Make it torch's current device."""
        with self._module.device(self.torch_device):
            yield

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """From torch's allocator, so that the ceiling counts it."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def pin(self, arena: Arena) -> None:
        """By ``cudaHostRegister``, for all devices: torch's own pinned allocator rounds up to powers of two."""
        with self.use():
            code = self._module.cudart().cudaHostRegister(arena.tensor.data_ptr(), arena.num_bytes, _PORTABLE)
        if int(code):
            raise ConfigurationError(
                f"the system does not let {format_size(arena.num_bytes)} of host memory be pinned (CUDA error "
                f"{int(code)}): pass a smaller host_memory, or raise the limit (ulimit -l; within WSL: .wslconfig)"
            )

    def unpin(self, arena: Arena) -> None:
        """By ``cudaHostUnregister``."""
        with self.use(), contextlib.suppress(RuntimeError):
            self._module.cudart().cudaHostUnregister(arena.tensor.data_ptr())

    def limit(self, num_bytes: int) -> None:
        """By torch's allocator, which then raises ``OutOfMemoryError``."""
        total = self._module.get_device_properties(self.torch_device).total_memory
        self._module.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.torch_device)

    def peak_bytes(self) -> int:
        """Reserved, with what the allocator holds in reserve."""
        return self._module.max_memory_reserved(self.torch_device)

    def free_unused(self) -> None:
        """The allocator's cache."""
        self._module.empty_cache()

    def is_lost(self, error: BaseException) -> bool:
        """Errors of the driver stay with the process; running out of memory is none."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


class _Queue:
    """The one queue that an Apple device has: all lanes are the same, so that whatever waits has what it waits for."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self, *, timed: bool = False) -> _Event:
        event = torch.mps.Event(enable_timing=timed)
        event.record()
        return _Event(event)

    def after(self, mark: _Event) -> None:
        mark.event.wait()


class MpsDevice:
    """An Apple device, through Metal. Written after torch's documentation; it never ran on one.

    Its memory is the host's, so nothing is pinned, and copies and compute take turns in one queue.

    Raises:
        ConfigurationError: there is none, or torch was built without it.
    """

    def __init__(self) -> None:
        if not torch.backends.mps.is_available():
            raise ConfigurationError("device is 'mps', and torch finds no Apple device here: pass device='cpu'")
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

    def is_lost(self, error: BaseException) -> bool:
        """Metal says so in words."""
        return not is_out_of_memory(error) and "MPSCommandBuffer" in str(error)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which device computes which of the decoder's layers.

    Attributes:
        devices: in the order in which a sweep first comes to them.
        layers: for each layer its place among *devices*.
    """

    devices: tuple[Device, ...]
    layers: tuple[int, ...]

    @property
    def first(self) -> Device:
        """That of the first layer, and of what comes before it."""
        return self.devices[self.layers[0]]

    @property
    def last(self) -> Device:
        """That of the last layer, and of the head."""
        return self.devices[self.layers[-1]]

    @property
    def name(self) -> str:
        """What the arithmetic depends on: alike devices compute alike, whichever has which layer."""
        return names_of_layers([device.name for device in self.devices], self.layers)

    def of(self, layer: int) -> Device:
        """That of *layer*."""
        return self.devices[self.layers[layer]]


def names_of_layers(names: Sequence[str], layers: Sequence[int]) -> str:
    """The name of what computes *layers* with devices of *names*: one, where all are alike."""
    return names[0] if len(set(names)) == 1 else ", ".join(names[place] for place in layers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* says that memory ran out, of a device or of the host."""
    words = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in words)


def resolve_device(name: str) -> torch.device:
    """What *name* means; ``"auto"``: a CUDA device where there is one, else the processor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def all_devices(count: int | None = None) -> list[torch.device]:
    """The first *count* CUDA devices, whether they are there or not; ``None``: all there are.

    Raises:
        ConfigurationError: there are none.
    """
    if count is None:
        _check_cuda(torch.device("cuda"))
        count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)]


def device_name(device: torch.device) -> str:
    """What the arithmetic of *device* depends on: the processor's is named elsewhere."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def is_there(device: torch.device) -> bool:
    """Whether this process can compute with *device*."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or torch.backends.mps.is_available()


def free_bytes(device: torch.device) -> int:
    """Memory of *device* that nobody uses.

    Raises:
        ConfigurationError: there is no such device.
    """
    if device.type == "mps":
        if not is_there(device):
            MpsDevice()  # says what is missing
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    _check_cuda(device)
    return torch.cuda.mem_get_info(device)[0]


def open_device(device: torch.device) -> Device | None:
    """The accelerator *device*; ``None``: the processor computes.

    Raises:
        ConfigurationError: there is no such device.
    """
    if device.type == "cpu":
        return None
    return MpsDevice() if device.type == "mps" else CudaDevice(device)


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = (
            f"torch {torch.__version__} was built for {built}, but finds no device or no driver: 'layerstream doctor'"
            if built
            else f"torch {torch.__version__} was built without CUDA: install a build for your driver "
            "(pytorch.org/get-started)"
        )
        raise ConfigurationError(f"device is {str(device)!r}, and {reason}; or pass device='cpu'")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        names = ", ".join(f"'cuda:{index}'" for index in range(count))
        raise ConfigurationError(f"device is {str(device)!r}, and this machine has {names}")
