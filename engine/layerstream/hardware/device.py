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

What implements this lies beside it: :mod:`cuda`, :mod:`mps`; a kind of devices is an :class:`Accelerator`, and
:mod:`accelerators` has all of them.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from layerstream.hardware.arena import Arena

Found = TypeVar("Found")


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


class EventMark:
    """A torch event; CUDA and Metal have the same calls."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def is_reached(self) -> bool:
        return self.event.query()

    def seconds_since(self, earlier: EventMark) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3


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

    def capture(self, run: Callable[[], Found]) -> tuple[Found, Callable[[], None]] | None:
        """Record what *run* queues to the compute lane. ``None``: this device cannot.

        Returns:
            What *run* returned, tensors that stay where they are, and what queues all of it again: then they hold what
            comes of what is in the tensors that *run* found there. *run* is called twice, and what it computed is not
            in what it returned until it is queued again.

        Raises:
            RuntimeError: *run* waits for the device, or memory ran out.
        """
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether *error* means that the device will not compute again in this process."""
        ...


class Accelerator(ABC):
    """A kind of devices: how they are found, what they are called, what they can.

    Attributes:
        name: torch's for the kind.
        has_numbers: whether there may be several, called ``name:0`` and so on.
        is_automatic: whether ``device="auto"`` chooses one.
        can_measure: whether it tells what products take.
        packages: those whose kernels are made for them; also torch's own kernels for ragged attention.
    """

    name: str
    has_numbers: bool = False
    is_automatic: bool = False
    can_measure: bool = False
    packages: frozenset[str] = frozenset()

    @abstractmethod
    def num_devices(self) -> int:
        """Those that this process can compute with."""

    @abstractmethod
    def check(self, device: torch.device) -> None:
        """Nothing, if *device* is there.

        Raises:
            ConfigurationError: says what is missing.
        """

    @abstractmethod
    def open(self, device: torch.device) -> Device:
        """*device*, which is there."""

    @abstractmethod
    def free_bytes(self, device: torch.device) -> int:
        """Memory of *device* that nobody uses."""

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait for all that *device* was given to do."""

    def name_of(self, device: torch.device) -> str:
        """What the arithmetic of *device* depends on."""
        return self.name

    def model_of(self, device: torch.device) -> str:
        """What the rates of *device* depend on."""
        return self.name_of(device)

    def product_seconds(self, device: torch.device, num_rows: int) -> float:
        """What a product of *num_rows* rows with a large matrix takes, where it ``can_measure``."""
        raise NotImplementedError

    def beside_bytes(self, device: torch.device) -> int:
        """What this process has on *device* beside torch's allocator: its context and libraries."""
        return 0


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
