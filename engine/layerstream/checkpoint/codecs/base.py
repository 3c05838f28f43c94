"""What a codec is: it knows which stored tensors form a matrix, and how to turn some of its rows into numbers.

A *packed* matrix ``(rows, columns)`` is stored as *planes*: codes, scales, zero points, tables. A plane whose bytes
belong to the rows in equal shares is cut when rows of the matrix are; the others (tables, scales of scales) are small
and always there as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod

import torch

Planes = Mapping[str, torch.Tensor]


class Codec(ABC):
    """One way to store a matrix. Immutable; the same for all matrices that are stored alike.

    Attributes:
        name: of the format, as users know it.
        whole: planes that belong to all rows.
        row_step: rows are cut at multiples of it; 0: the matrix is never cut.
    """

    name: str
    whole: frozenset[str] = frozenset()
    row_step: int = 1

    @abstractmethod
    def expected(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the planes of a matrix ``(rows, columns)`` have."""

    @abstractmethod
    def decode(self, planes: Planes, first: int, out: torch.Tensor) -> None:
        """Write rows ``[first, first + n)`` of the matrix to *out* ``(n, columns)``, rounded to its dtype.

        Args:
            planes: cut to those rows, but for those in ``whole``.
        """

    def cut(self, planes: Planes, num_rows: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Of *planes* that are those of *num_rows* rows, the part of rows ``[start, stop)`` among them."""
        return {
            name: plane if name in self.whole else _part(plane, num_rows, start, stop) for name, plane in planes.items()
        }


def _part(plane: torch.Tensor, num_rows: int, start: int, stop: int) -> torch.Tensor:
    """A view: planes are contiguous."""
    if plane.shape[0] == num_rows:
        return plane[start:stop]
    size = plane.shape[0]
    if size * start % num_rows == 0 and size * stop % num_rows == 0:
        return plane[size * start // num_rows : size * stop // num_rows]
    flat, size = plane.reshape(-1), prod(plane.shape)
    return flat[size * start // num_rows : size * stop // num_rows]
