"""Which way to multiply by quantised weights is faster on this machine, by the rows of a row block.

Measured once and remembered in the user's cache folder: the numbers go into every plan, and with it into the
fingerprint of stored KV, so that they must not change from one process to the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from layerstream.checkpoint.codecs.encode import ENCODERS
from layerstream.core.formats import KERNELS
from layerstream.hardware.remembered import Remembered, machine_name
from layerstream.model.linear import PackedMatrix, tile_rows

logger = logging.getLogger(__name__)

VARIABLE = "LAYERSTREAM_KERNELS"
SIZE = 4096  # of the square matrix that is multiplied by: larger than a core's cache in any format
ROWS = (4, 8, 16, 32, 64)  # chunks of prompts have more, and share what is decoded; smaller row blocks cost in calls
REPEATS = 3


def fused_rows(kernels: Iterable[str]) -> dict[str, int]:
    """For each of *kernels*, the most rows of a row block that it is faster for than decoding; those of 0 left out.

    Remembered in the file that ``LAYERSTREAM_KERNELS`` names, else in the user's cache folder.
    """
    wanted = set(kernels)
    if not wanted:
        return {}
    machine = machine_name()
    file = Remembered.named(VARIABLE, "kernels.json", lock_seconds=-1)  # others wait rather than measure at once

    def complete(known: dict[str, Any]) -> None:
        if not wanted <= _rows_of(known, machine).keys():
            known[machine] = {name: measure(name) for name in KERNELS}

    try:
        found = _rows_of(file.change(complete), machine)
    except OSError as error:
        logger.warning("%s cannot be written (%s): kernels are measured anew by every process", file.path, error)
        found = {name: measure(name) for name in wanted}
    return {name: found[name] for name in sorted(wanted) if found[name]}


def measure(kernel: str) -> int:
    """The most rows for which *kernel* is no slower than decoding; 0: it is slower, wrong or absent."""
    matrix = sample_matrix(KERNELS[kernel].name)
    inputs = torch.randn((ROWS[-1], SIZE), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    try:
        if not _agrees(matrix, inputs[:2]):
            return 0
        best = 0
        for rows in ROWS:
            if _seconds(matrix.product, inputs[:rows]) > _seconds(partial(_decoded, matrix), inputs[:rows]):
                break
            best = rows
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("the kernel %s is not used: %s", kernel, error)
        return 0
    logger.info("the kernel %s is used for up to %d rows", kernel, best)
    return best


def sample_matrix(kind: str, dtype: torch.dtype = torch.bfloat16) -> PackedMatrix:
    """A random matrix ``(SIZE, SIZE)`` in the format *kind*, to be decoded to *dtype*."""
    codec, planes = ENCODERS[kind].sample(SIZE)
    scratch = torch.empty(tile_rows(codec, SIZE, SIZE) * SIZE, dtype=dtype)
    return PackedMatrix(codec, planes, 0, SIZE, SIZE, scratch)


def _agrees(matrix: PackedMatrix, inputs: torch.Tensor) -> bool:
    """The kernel reads the layout as it is meant, and gives a row the same bits beside others."""
    found, expected = matrix.product(inputs), _decoded(matrix, inputs)
    difference = (found.float() - expected.float()).abs().max()
    is_close = bool(difference <= 0.02 * expected.float().abs().max())
    return is_close and torch.equal(matrix.product(inputs[:1]), found[:1])


def _decoded(matrix: PackedMatrix, inputs: torch.Tensor) -> torch.Tensor:
    output = inputs.new_empty((inputs.shape[0], matrix.last))
    for start, stop, weight in matrix.tiles():
        output[:, start:stop] = F.linear(matrix.arranged(inputs), weight)
    return output


def _seconds(multiply: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        multiply(inputs)
        best = min(best, time.perf_counter() - started)
    return best


def _rows_of(known: dict[str, Any], machine: str) -> dict[str, int]:
    """What is remembered of *machine*; nothing if it is not what was written here."""
    try:
        return {str(name): int(rows) for name, rows in known[machine].items()}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}
