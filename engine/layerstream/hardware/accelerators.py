"""Which devices this machine has, and what they are called: the registry of accelerators.

A kind of accelerator is one :class:`~layerstream.hardware.device.Accelerator` in a file of its own, and a line in
:data:`ACCELERATORS`. Whoever has to know what a device can asks here; the processor is no accelerator.
"""

from __future__ import annotations

import re

import torch

from layerstream.hardware.cuda import Cuda
from layerstream.hardware.device import Accelerator, Device
from layerstream.hardware.mps import Mps

PROCESSOR = "cpu"
_NAME = re.compile(r"(\w+?)(?::(\d+))?")

ACCELERATORS: dict[str, Accelerator] = {kind.name: kind for kind in (Cuda(), Mps())}
"""By torch's name for the kind, in the order in which ``"auto"`` tries them."""


def accelerator_of(device: torch.device) -> Accelerator | None:
    """The kind that *device* is of; ``None``: it is the processor."""
    return None if device.type == PROCESSOR else ACCELERATORS[device.type]


def is_device_name(name: str) -> bool:
    """Whether *name* could be a device's, or ``"auto"``."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    kind, number = match.groups()
    if number is not None:
        return kind in ACCELERATORS and ACCELERATORS[kind].has_numbers
    return kind in ("auto", PROCESSOR) or kind in ACCELERATORS


def resolve_device(name: str) -> torch.device:
    """What *name* means; ``"auto"``: the first kind that is there and wants to be chosen, else the processor."""
    if name != "auto":
        return torch.device(name)
    chosen = (kind.name for kind in ACCELERATORS.values() if kind.is_automatic and kind.num_devices())
    return torch.device(next(chosen, PROCESSOR))


def all_devices(count: int | None = None) -> list[torch.device]:
    """The first *count* CUDA devices, whether they are there or not; ``None``: all there are.

    Raises:
        ConfigurationError: there are none.
    """
    cuda = ACCELERATORS["cuda"]
    if count is None:
        cuda.check(torch.device("cuda"))
        count = cuda.num_devices()
    return [torch.device("cuda", index) for index in range(count)]


def device_name(device: torch.device) -> str:
    """What the arithmetic of *device* depends on: the processor's is named elsewhere."""
    kind = accelerator_of(device)
    return PROCESSOR if kind is None else kind.name_of(device)


def is_there(device: torch.device) -> bool:
    """Whether this process can compute with *device*."""
    kind = accelerator_of(device)
    return kind is None or (device.index or 0) < kind.num_devices()


def can_run(package: str, device: torch.device) -> bool:
    """Whether the kernels of *package* are made for *device*."""
    kind = ACCELERATORS.get(device.type)
    return kind is not None and package in kind.packages


def free_bytes(device: torch.device) -> int:
    """Memory of the accelerator *device* that nobody uses.

    Raises:
        ConfigurationError: there is no such device.
    """
    kind = ACCELERATORS[device.type]
    kind.check(device)
    return kind.free_bytes(device)


def open_device(device: torch.device) -> Device | None:
    """The accelerator *device*; ``None``: the processor computes.

    Raises:
        ConfigurationError: there is no such device.
    """
    kind = accelerator_of(device)
    if kind is None:
        return None
    kind.check(device)
    return kind.open(device)
