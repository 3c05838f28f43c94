"""Which devices this machine has, and what they are called."""

from __future__ import annotations

import torch

from layerstream.hardware.cuda import CudaDevice, check_cuda, cuda_name
from layerstream.hardware.device import Device
from layerstream.hardware.mps import MpsDevice


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
        check_cuda(torch.device("cuda"))
        count = torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(count)]


def device_name(device: torch.device) -> str:
    """What the arithmetic of *device* depends on: the processor's is named elsewhere."""
    return cuda_name(device) if device.type == "cuda" else device.type


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
    check_cuda(device)
    return torch.cuda.mem_get_info(device)[0]


def open_device(device: torch.device) -> Device | None:
    """The accelerator *device*; ``None``: the processor computes.

    Raises:
        ConfigurationError: there is no such device.
    """
    if device.type == "cpu":
        return None
    return MpsDevice() if device.type == "mps" else CudaDevice(device)
