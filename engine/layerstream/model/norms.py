"""Norms of rows in one launch, on a device.

Every family has a class of its own for them, which takes up to eight launches. Where a probe on the processor finds
that an instance computes one of torch's :data:`KERNELS` by some epsilon of its own and one of :data:`SCALES`, it does
that instead. Everything else (a gate, groups, weights in another dtype than the rows) stays as it is.

Weights come and go: they are read at every call. What is made of one is kept for as long as the module has that very
tensor; whoever binds other numbers binds another tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import TypeAlias

import torch
from torch.nn import functional as F

Kernel: TypeAlias = Callable[[torch.Tensor, torch.Size, torch.Tensor | None, float], torch.Tensor]
Scale: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def _layer_norm(hidden: torch.Tensor, shape: torch.Size, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return F.layer_norm(hidden, shape, weight, None, epsilon)


KERNELS: tuple[Kernel, ...] = (F.rms_norm, _layer_norm)
SCALES: tuple[Scale, ...] = (lambda weight: weight, lambda weight: weight + 1)
"""What normalised rows are multiplied by, out of a weight."""

_PROBED_WIDTH = 64  # of a norm without a weight
_MAGNITUDES = (1e-3, 1.0, 30.0)  # of rows: among the smallest epsilon shows
_FP32_TOLERANCE = 1e-5
_ROUNDINGS = 2  # of the compute dtype: of the normalised row, of the scale, and of their product, half each


def fuse(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Have *module*, if it is such a norm, compute in one launch what it is given in *dtype*; whether it does."""
    if not _may_be(module):
        return False
    epsilons = sorted({value for value in vars(module).values() if isinstance(value, float)})
    for kernel, epsilon, scale in product(KERNELS, epsilons, SCALES):
        fused = _Fused(module, kernel, epsilon, scale)
        if all(_agrees(module, fused, probed) for probed in dict.fromkeys((torch.float32, dtype))):
            module.forward = fused
            return True
    return False


class _Fused:
    """The forward of *module*."""

    def __init__(self, module: torch.nn.Module, kernel: Kernel, epsilon: float, scale: Scale) -> None:
        self._parameters = module._parameters
        self._own = module.forward
        self._kernel = kernel
        self._epsilon = epsilon
        self._scale = scale
        self._weight: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if weight is None:
            return self._kernel(hidden, hidden.shape[-1:], None, self._epsilon)
        if weight.dtype != hidden.dtype:
            return self._own(hidden)
        if weight is not self._weight:
            self._weight, self._made = weight, self._scale(weight)
        return self._kernel(hidden, weight.shape, self._made, self._epsilon)


def _may_be(module: torch.nn.Module) -> bool:
    """Whether it is called a norm, takes rows alone, and has one weight for a row, if any."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm):
        return False
    own = {name: weight for name, weight in module._parameters.items() if weight is not None}
    is_flat = own.keys() <= {"weight"} and all(weight.dim() == 1 for weight in own.values())
    is_leaf = next(module.children(), None) is None and not module._buffers
    return is_flat and is_leaf and len(inspect.signature(module.forward).parameters) == 1


def _agrees(module: torch.nn.Module, fused: _Fused, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = module._parameters.get("weight")
    width = _PROBED_WIDTH if weight is None else len(weight)
    rows = torch.randn((2 * len(_MAGNITUDES), width), generator=generator)
    rows = (rows * torch.tensor(_MAGNITUDES).repeat(2)[:, None]).to(dtype)
    with torch.inference_mode(), _weighed(module, torch.randn(width, generator=generator).to(dtype)):
        expected, found = module(rows), fused(rows)
    tolerance = _FP32_TOLERANCE if dtype == torch.float32 else _ROUNDINGS * torch.finfo(dtype).eps
    is_alike = expected.dtype == found.dtype and expected.shape == found.shape
    return is_alike and torch.allclose(found, expected, rtol=tolerance, atol=tolerance * _MAGNITUDES[0])


@contextmanager
def _weighed(module: torch.nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """*module* has *weight*, if it has any."""
    own = module._parameters.get("weight")
    if own is None:
        yield
        return
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters["weight"] = own
