"""bitsandbytes' own kernel for its 4-bit formats, where it is installed and gives the formula's bits.

Whether it does is seen, not assumed: the first matrix of a kind is decoded both ways. Where a bit differs, or the
kernel cannot run, matrices of that kind are decoded by the formula from then on.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

logger = logging.getLogger(__name__)

Kind: TypeAlias = tuple[str, int, torch.dtype, torch.device]
"""Format, values that share a scale, dtype decoded to, and where."""

_agrees: dict[Kind, bool] = {}


@functools.cache
def import_bitsandbytes() -> Any:
    """The package. Where it falls back to a slower kernel of its own it says so to whoever listens, as a warning; none
    of those kernels is used here.

    Raises:
        ImportError: it is not installed.
    """
    noisy = logging.getLogger("bitsandbytes.backends")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        noisy.setLevel(level)


def decode(
    name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, formula: Callable[[], None]
) -> None:
    """Write values to *out* ``(n, columns)``, contiguous.

    Args:
        name: ``"nf4"`` or ``"fp4"``.
        blocksize: values that share a scale.
        codes: ``(n * columns // 2,)`` uint8.
        scales: ``(n * columns // blocksize,)`` fp32.
        formula: writes them to *out*, without the kernel.
    """
    kind = (name, blocksize, out.dtype, out.device)
    agrees = _agrees.get(kind)
    if agrees:
        _run(name, blocksize, codes, scales, out)
        return
    formula()
    if agrees is None:
        _agrees[kind] = _gives(name, blocksize, codes, scales, out)


def _gives(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the kernel runs and writes *expected*, bit for bit."""
    found = torch.empty_like(expected)
    try:
        _run(name, blocksize, codes, scales, found)
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the package, there is the formula
        logger.info("bitsandbytes' kernel for %s cannot run on %s (%s)", name, expected.device, error)
        return False
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    agrees = torch.equal(found.view(bits), expected.view(bits))
    if not agrees:
        logger.info("bitsandbytes' kernel for %s on %s rounds otherwise; it is not used", name, expected.device)
    return agrees


def _run(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    import_bitsandbytes()  # registers the operation
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, scales, blocksize, name, out.shape, out.dtype, out=out)
