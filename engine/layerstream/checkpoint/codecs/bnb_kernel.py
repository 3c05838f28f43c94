"""bitsandbytes' own kernels for its 4-bit formats, where it is installed and they do as the formula says.

That is seen, not assumed. What decodes has to give the formula's bits for the beginning of the first matrix of a kind.
What multiplies has to come close to the product with what is decoded, and to give a row the same bits wherever it
stands and whatever the others are. Where that is not so, or the kernel cannot run, matrices of that kind are decoded by
the formula from then on.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

logger = logging.getLogger(__name__)

Kind: TypeAlias = tuple[str, int, torch.dtype, torch.device]
"""Format, values that share a scale, dtype decoded to, and where."""

PROBED_BLOCKS = 1024  # of scales and their values, that are decoded both ways
NESTED_BLOCK = 256  # scales that share a scale, where the product takes nested ones
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # that the product is asked about
FLOOR_ROWS = 4  # that bitsandbytes' product is made for on any card
TOLERANCE = 0.02  # of the largest value

_agrees: dict[Kind, bool] = {}
_scales_agree: dict[tuple[int, torch.device], bool] = {}
_most_rows: dict[tuple[Any, ...], int] = {}


@dataclass(frozen=True, slots=True)
class Nested:
    """Scales as bytes: positions in *table* ``(256,)``; *offset* ``()`` is added. Both in fp32."""

    codes: torch.Tensor
    table: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of *shape* ``(rows, columns)``, whose columns are whole blocks.

    Attributes:
        codes: two to a byte.
        absmax: a scale for each block, in fp32, or for each :data:`NESTED_BLOCK` scales.
    """

    name: str
    blocksize: int
    shape: tuple[int, int]
    codes: torch.Tensor
    absmax: torch.Tensor
    nested: Nested | None = None


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


def version() -> str:
    """Of the package; ``"none"``: it is not installed."""
    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return "none"


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


def scales(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Nested scales ``(n,)`` in fp32, before their offset is added.

    Args:
        codes: ``(n,)`` uint8, positions in *table* ``(256,)``.
        absmax: a scale for each *blocksize* of them.
    """
    kind = blocksize, codes.device
    if kind not in _scales_agree:
        _scales_agree[kind] = _gives_scales(codes[: 2 * blocksize], absmax, table, blocksize)
    return (_run_scales if _scales_agree[kind] else _scales)(codes, absmax, table, blocksize)


def most_rows(matrix: Packed, dtype: torch.dtype, formula: Callable[[], torch.Tensor]) -> int:
    """The most rows of inputs in *dtype* that :func:`multiply` is faster for than decoding, and right; 0: none.

    Args:
        formula: gives some of the first rows of *matrix*, decoded.
    """
    kind = matrix.name, matrix.blocksize, matrix.shape, matrix.nested is None, dtype, matrix.codes.device
    if kind not in _most_rows:
        _most_rows[kind] = _measure_rows(matrix, dtype, formula)
    return _most_rows[kind]


def multiply(matrix: Packed, inputs: torch.Tensor) -> torch.Tensor:
    """*inputs* ``(m, columns)`` times the transpose of *matrix*: ``(m, rows)``. Only for at most :func:`most_rows`."""
    nested = matrix.nested
    inner = (None, None, None) if nested is None else (nested.codes, nested.table, nested.offset)
    return torch.ops.bitsandbytes.gemm_4bit.default(
        inputs, matrix.codes, matrix.shape, matrix.absmax, matrix.blocksize, matrix.name, None, *inner
    )


def tuned_rows(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> int:
    """The most of :data:`ROWS` for which bitsandbytes multiplies by a matrix of *shape* undecoded; for more it makes
    room for a decoded copy, which nobody planned. It keeps to itself from where on: if it is not found, few rows."""
    import_bitsandbytes()
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return 0
    ops = importlib.import_module("bitsandbytes.backends.cuda.ops")
    decides = getattr(ops, "_gemm_4bit_use_custom_fn", None)
    if decides is None:
        return FLOOR_ROWS
    most = min(int(getattr(ops, "_gemm_4bit_custom_max_m", FLOOR_ROWS)), ROWS[-1])
    good = [rows for rows in ROWS if rows <= most and decides(device.index or 0, dtype, rows, *shape)]
    return max(good, default=0)


def _measure_rows(matrix: Packed, dtype: torch.dtype, formula: Callable[[], torch.Tensor]) -> int:
    device, best = matrix.codes.device, 0
    try:
        tuned = tuned_rows(device, dtype, matrix.shape)
        values = formula() if tuned else None
        for rows in ROWS:
            if values is None or rows > tuned or not _multiplies(matrix, values, rows):
                break
            best = rows
    except torch.OutOfMemoryError:  # another time there may be enough
        raise
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the package, there is the formula
        logger.info("bitsandbytes' product with %s cannot run on %s (%s)", matrix.name, device, error)
        return 0
    logger.info("bitsandbytes multiplies %s of %s on %s for up to %d rows", matrix.name, matrix.shape, device, best)
    return best


def _multiplies(matrix: Packed, values: torch.Tensor, rows: int) -> bool:
    """Whether the product comes close to that with *values*, and a row has the same bits at another place."""
    drawn = torch.randn((rows, matrix.shape[1]), generator=torch.Generator().manual_seed(rows))
    inputs = drawn.to(values.device, values.dtype)
    found, expected = multiply(matrix, inputs), F.linear(inputs, values).to(torch.float32)
    difference = (found[:, : len(values)].to(torch.float32) - expected).abs().max()
    turned = multiply(matrix, inputs.flip(0)).flip(0)
    return bool(difference <= TOLERANCE * expected.abs().max()) and torch.equal(found, turned)


def _gives(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, written: torch.Tensor) -> bool:
    """Whether the kernel runs and writes the beginning of what was *written*, bit for bit."""
    count = min(len(scales), PROBED_BLOCKS)
    expected = written.view(-1, blocksize)[:count]
    found = torch.empty_like(expected)
    try:
        _run(name, blocksize, codes[: count * blocksize // 2], scales[:count], found)
    except torch.OutOfMemoryError:  # another time there may be enough
        raise
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the package, there is the formula
        logger.info("bitsandbytes' kernel for %s cannot run on %s (%s)", name, expected.device, error)
        return False
    agrees = _are_same(found, expected)
    if not agrees:
        logger.info("bitsandbytes' kernel for %s on %s rounds otherwise; it is not used", name, expected.device)
    return agrees


def _gives_scales(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int) -> bool:
    """Whether the kernel for nested scales runs and gives the formula's bits."""
    try:
        return _are_same(_run_scales(codes, absmax, table, blocksize), _scales(codes, absmax, table, blocksize))
    except torch.OutOfMemoryError:  # another time there may be enough
        raise
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the package, there is the formula
        logger.info("bitsandbytes' kernel for nested scales cannot run on %s (%s)", codes.device, error)
        return False


def _are_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return torch.equal(found.view(bits), expected.view(bits))


def _run(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    import_bitsandbytes()  # registers the operation
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, scales, blocksize, name, out.shape, out.dtype, out=out)


def _run_scales(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int) -> torch.Tensor:
    import_bitsandbytes()
    return torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, table, blocksize, torch.float32)


def _scales(codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, blocksize: int) -> torch.Tensor:
    own = absmax.repeat_interleave(blocksize)[: len(codes)]
    return table.index_select(0, codes.to(torch.int32)).mul_(own)
