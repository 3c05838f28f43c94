"""flash-linear-attention's kernels of delta rules, where it is installed: for rows on a CUDA device in 16 bits.

Rows in fp32 are left to torch: the kernels would multiply them in fewer bits. Never called for the processor's tensors,
for which the package has nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

WIDEST = 256  # of a key, in its kernels
_KERNELS = {  # by whether a decay is a channel's, and whether rows are a chunk
    (False, True): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    (False, False): ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    (True, True): ("fla.ops.kda", "chunk_kda"),
    (True, False): ("fla.ops.kda", "fused_recurrent_kda"),
}


@functools.cache
def is_installed() -> bool:
    """Whether there are such kernels at all."""
    return importlib.util.find_spec("fla") is not None


def version() -> str | None:
    """Of the package, if this process may call it."""
    return importlib.import_module("fla").__version__ if is_installed() and torch.cuda.is_available() else None


def takes(key: torch.Tensor) -> bool:
    """Whether there are kernels for calls whose keys are *key* ``(..., width)``."""
    is_narrow = key.dtype in (torch.bfloat16, torch.float16) and key.shape[-1] <= WIDEST
    return key.is_cuda and is_narrow and is_installed()


@functools.cache
def kernel(by_channel: bool, is_chunk: bool) -> Any:
    """The function for a chunk of rows, or for single ones, with a decay per channel or per head."""
    module, name = _KERNELS[by_channel, is_chunk]
    return getattr(importlib.import_module(module), name)
