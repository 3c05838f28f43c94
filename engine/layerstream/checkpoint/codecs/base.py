"""What a codec is: it knows which stored tensors form a matrix, and how to turn some of its rows into numbers.

A *packed* matrix ``(rows, columns)`` is stored as *planes*: codes, scales, zero points, tables. A plane whose bytes
belong to the rows in equal shares is cut when rows of the matrix are; the others (tables, scales of scales) are small
and always there as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from math import prod

import torch

Planes = Mapping[str, torch.Tensor]
FLOATS = frozenset({"F32", "F16", "BF16"})


def stored_as(**planes: str) -> Mapping[str, frozenset[str]]:
    """What each of *planes* may be stored as, in safetensors' words."""
    return {plane: frozenset(words.split()) for plane, words in planes.items()}


class Codec(ABC):
    """One way to store a matrix. Immutable; the same for all matrices that are stored alike.

    Attributes:
        name: of the format, as users know it.
        whole: planes that belong to all rows.
        row_step: rows are cut at multiples of it; 0: the matrix is never cut.
        kernel: which kernel multiplies by it without decoding; ``""``: none does.
        work_bytes: on an accelerator, what decoding takes for a value beside the value.
        columns_first: whether it is decoded fastest into the transpose of a contiguous matrix.
        transposes: whether its matrices are the transposes of the model's.
        dtypes: for each plane what it may be stored as; those that are not in it: floats.
    """

    name: str
    whole: frozenset[str] = frozenset()
    row_step: int = 1
    kernel: str = ""
    work_bytes: int = 12
    columns_first: bool = False
    transposes: bool = False
    dtypes: Mapping[str, frozenset[str]] = stored_as()

    @abstractmethod
    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the planes of a matrix ``(rows, columns)`` have."""

    @abstractmethod
    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Write rows ``[first, first + n)`` of the matrix to *out* ``(n, columns)``, rounded to its dtype.

        Args:
            planes: cut to those rows, but for those in ``whole``.
        """

    def decode_arranged(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """As :meth:`decode`, with the columns in the order that :meth:`arranged` gives inputs: any that is faster."""
        self.decode(planes, first, out)

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """*inputs* ``(m, columns)`` in that order."""
        return inputs

    def stacked(self, count: int) -> Codec | None:
        """Of *count* such matrices one below the other, if their planes one after the other are its planes."""
        return self if self.row_step and not self.whole else None

    def one_of(self, count: int) -> Codec | None:
        """Of one of *count* matrices that stand one below the other, if all its planes are cut where they are."""
        return self if self.row_step and not self.whole else None

    def product(self, planes: Planes, inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        """*inputs* ``(m, columns)`` in bfloat16 times the transpose of the matrix, or of its rows from *first* on,
        undecoded: ``(m, rows)`` or wider.

        A row of the result does not depend on the others, bit for bit; on an accelerator, as long as *m* is the same.
        Only where there is a ``kernel``, or where :meth:`device_rows` says so.
        """
        raise NotImplementedError

    def device_rows(self, planes: Planes, first: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """The most rows of inputs in *dtype* that :meth:`product` is good for where *planes* are, on an accelerator; 0:
        it is not. The same for all matrices of *shape*. It waits for the device."""
        return 0

    def affine_group(self, columns: int) -> int:
        """How many neighbours in a row share a scale, if values are linear in a code of 4 bits; else 0."""
        return 0

    def affine(self, planes: Planes, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes ``(rows, columns)`` in 0…15, scales and offsets ``(rows, groups)``: a value is
        ``(code - 8) * scale + offset``. Only where there is an ``affine_group``."""
        raise NotImplementedError

    def cut(self, planes: Planes, num_rows: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Of *planes* that are those of *num_rows* rows, the part of rows ``[start, stop)`` among them."""
        return {
            name: plane if name in self.whole else _part(plane, num_rows, start, stop) for name, plane in planes.items()
        }


def matrix_shape(codec: Codec, shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, columns)`` of what is stored for a parameter of *shape*: experts one below the other, a vector as one
    column."""
    if len(shape) < 2:
        return prod(shape), 1
    rows, columns = (shape[-1], shape[-2]) if codec.transposes else (shape[-2], shape[-1])
    return prod(shape[:-2]) * rows, columns


@cache
def pair_table(values: tuple[float, ...], first_bits: int) -> torch.Tensor:
    """``(256,)``: for each byte the two of 16 *values* that it stands for, in fp32, seen as one integer of 64 bits. The
    first is the one whose code is in the four bits from *first_bits* on."""
    table, codes = torch.tensor(values), torch.arange(256)
    both = [table[(codes >> bits) & 15] for bits in (first_bits, 4 - first_bits)]
    return torch.stack(both, dim=1).contiguous().view(torch.int64).view(-1)


def in_dtype(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """*scales* so that one operator on them and codes rounds once, to values in *dtype*: in it, or in fp32."""
    return scales if scales.dtype == dtype else scales.to(torch.float32)


@cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`nibbles` multiplies bytes by, and what it adds to them."""
    shifts = torch.tensor([16, 1], dtype=torch.uint8, device=device)
    return shifts, torch.tensor([128], dtype=torch.uint8, device=device)


def nibbles(
    codes: torch.Tensor, dim: int, out: torch.Tensor | None = None, *, less_eight: bool = False
) -> torch.Tensor:
    """The lower and the upper half of each byte, side by side along a new dimension *dim*, by two operators: uint8 in
    0…15, or, *less_eight*, int8 in -8…7.

    The lower half is moved up, where the upper one is; then both are moved down.

    Args:
        out: where they are written to, of any strides.
    """
    shifts, middle = _constants(codes.device)
    wide, factors = codes.unsqueeze(dim), shifts.view(2, *[1] * (codes.dim() - dim))
    if out is None:
        out = codes.new_empty((*codes.shape[:dim], 2, *codes.shape[dim:]))
    if less_eight:
        torch.addcmul(middle, wide, factors, out=out)
        return out.view(torch.int8).bitwise_right_shift_(4)
    return torch.mul(wide, factors, out=out).bitwise_right_shift_(4)


def _part(plane: torch.Tensor, num_rows: int, start: int, stop: int) -> torch.Tensor:
    """A view: planes are contiguous."""
    if plane.shape[0] == num_rows:
        return plane[start:stop]
    size = plane.shape[0]
    if size * start % num_rows == 0 and size * stop % num_rows == 0:
        return plane[size * start // num_rows : size * stop // num_rows]
    flat, size = plane.reshape(-1), prod(plane.shape)
    return flat[size * start // num_rows : size * stop // num_rows]
