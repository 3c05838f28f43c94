"""How a page-layer is encoded on disk: exactly, or in half the bytes or fewer.

| name | keys | values | bytes per value |
|---|---|---|---|
| ``none`` | as computed | as computed | 2 or 4: what was stored comes back bit for bit |
| ``int8`` | symmetric, one scale per head and channel over the page's tokens | one scale per token and head | 1 |
| ``fp8`` | E4M3, one scale per head | E4M3, one scale per head | 1 |

Keys have outlier channels and values do not (KIVI, arXiv 2402.02750), hence the two directions of int8. Scales are
fp32 and stand before the values. Every codec is its own namespace, because what it brings back is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from layerstream.kv.shape import PageShape

_INT8_MAX = 127.0
_FP8_MAX = 448.0  # the largest finite E4M3


class PageCodec(Protocol):
    """Encodes keys ``(tokens, heads, width)`` and values ``(tokens, heads, width of values)`` of one page-layer."""

    name: str

    def num_bytes(self, shape: PageShape, page_tokens: int) -> int:
        """Length of an encoded page-layer."""
        ...

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[memoryview]:
        """Buffers that together are the encoded page-layer."""
        ...

    def decode(self, data: memoryview, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write what *data* encodes to *keys* and *values*."""
        ...


class Lossless:
    """The bytes as they are."""

    name = "none"

    def num_bytes(self, shape: PageShape, page_tokens: int) -> int:
        """Length of an encoded page-layer."""
        return page_tokens * (shape.key_bytes + shape.value_bytes)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[memoryview]:
        """Views of *keys* and *values*; nothing is copied."""
        return [_bytes_of(keys).data, _bytes_of(values).data]

    def decode(self, data: memoryview, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy *data* to *keys* and *values*."""
        source = np.frombuffer(data, np.uint8)
        key_bytes = _bytes_of(keys)
        key_bytes[:] = source[: key_bytes.size]
        _bytes_of(values)[:] = source[key_bytes.size :]


class Scaled:
    """One byte per value, times a scale that several values share.

    Args:
        key_dims, value_dims: dimensions of ``(tokens, heads, width)`` that share a scale.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, most: float, key_dims: tuple[int, ...], value_dims: tuple[int, ...]
    ) -> None:
        self.name = name
        self._dtype = dtype
        self._most = most
        self._dims = key_dims, value_dims

    def num_bytes(self, shape: PageShape, page_tokens: int) -> int:
        """Length of an encoded page-layer."""
        keys = (page_tokens, shape.key_heads, shape.key_width)
        values = (page_tokens, shape.value_heads, shape.value_width)
        return sum(
            4 * _product(_scale_shape(sizes, dims)) + _product(sizes)
            for sizes, dims in zip((keys, values), self._dims, strict=True)
        )

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[memoryview]:
        """Scales and values of the keys, then of the values."""
        buffers = []
        for tensor, dims in zip((keys, values), self._dims, strict=True):
            exact = tensor.float()
            scales = exact.abs().amax(dim=dims, keepdim=True).clamp_min(1e-12) / self._most
            scaled = exact / scales
            stored = scaled.round().to(self._dtype) if self._dtype == torch.int8 else scaled.to(self._dtype)
            buffers += [_bytes_of(scales).data, _bytes_of(stored).data]
        return buffers

    def decode(self, data: memoryview, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Multiply the scales out."""
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        at = 0
        with torch.inference_mode():
            for tensor, dims in zip((keys, values), self._dims, strict=True):
                scale_shape = _scale_shape(tuple(tensor.shape), dims)
                middle = at + 4 * _product(scale_shape)
                stop = middle + tensor.numel()
                scales = source[at:middle].view(torch.float32).view(scale_shape)
                stored = source[middle:stop].view(self._dtype).view(tensor.shape)
                tensor.copy_(stored.float() * scales)
                at = stop


CODECS: dict[str, PageCodec] = {
    codec.name: codec
    for codec in (
        Lossless(),
        Scaled("int8", torch.int8, _INT8_MAX, key_dims=(0,), value_dims=(2,)),
        Scaled("fp8", torch.float8_e4m3fn, _FP8_MAX, key_dims=(0, 2), value_dims=(0, 2)),
    )
}


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous *tensor*, without a copy."""
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).view(-1).numpy()


def _scale_shape(sizes: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if dim in dims else size for dim, size in enumerate(sizes))


def _product(sizes: tuple[int, ...]) -> int:
    return int(np.prod(sizes, dtype=np.int64))
