"""The tensors behind the pages: per layer, what transformers' ``Cache.update`` receives.

Layout: one tensor per layer and kind, ``(num_pages · page_tokens, heads, width)``, so that neighbouring pages are
neighbouring rows and a contiguous run of pages is one view. Keys and values are whatever the model caches: after RoPE,
per KV head; for MLA the latents (one head). Memory is reserved when a layer is first written and touched as pages fill.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch

from layerstream.kv.segment import PageShape
from layerstream.streaming.residency import PAGE
from layerstream.streaming.ring import Arena


class PageMemory:
    """The memory that the pages of all layers lie in: *num_bytes* in one piece, handed out once.

    Touching a page for the first time costs more than filling it, so :meth:`populate` does it ahead, while the engine
    reads its weights and the processor is idle.
    """

    def __init__(self, num_bytes: int) -> None:
        self._arena = Arena(num_bytes)
        self._used = 0

    def take(self, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor, page-aligned; from elsewhere if there is not enough left."""
        num_bytes = prod(shape) * dtype.itemsize
        start, stop = self._used, self._used + num_bytes
        if stop > self._arena.num_bytes:
            return Arena(num_bytes).tensor[:num_bytes].view(dtype).view(shape)
        self._used = -(-stop // PAGE) * PAGE
        return self._arena.tensor[start:stop].view(dtype).view(shape)

    def populate(self) -> None:
        """Touch all of it."""
        self._arena.populate()


class LayerState:
    """Keys and values of one layer for all pages."""

    def __init__(self, num_pages: int, page_tokens: int, memory: PageMemory) -> None:
        self._memory = memory
        self._num_rows = num_pages * page_tokens
        self._page_tokens = page_tokens
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def shape(self) -> PageShape | None:
        """What one token takes; ``None`` before anything was written."""
        if self._keys is None or self._values is None:
            return None
        _, key_heads, key_width = self._keys.shape
        _, value_heads, value_width = self._values.shape
        return PageShape(key_heads, key_width, value_heads, value_width, str(self._keys.dtype).removeprefix("torch."))

    def reserve(self, shape: PageShape) -> None:
        """Make room for tokens of *shape*, unless there is.

        Raises:
            ValueError: there is room for tokens of another shape.
        """
        if self._keys is None:
            dtype = getattr(torch, shape.dtype)
            self._keys = self._memory.take((self._num_rows, shape.key_heads, shape.key_width), dtype)
            self._values = self._memory.take((self._num_rows, shape.value_heads, shape.value_width), dtype)
        elif shape != self.shape:
            raise ValueError(f"pages of {shape} do not fit among those of {self.shape}")

    def append(self, pages: list[int], start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens ``[start, start + T)`` of the sequence that owns *pages*.

        Args:
            keys: ``(heads, T, width)``.
            values: ``(heads, T, width of values)``.
        """
        if self._keys is None or self._values is None:
            self._keys = self._memory.take((self._num_rows, keys.shape[0], keys.shape[2]), keys.dtype)
            self._values = self._memory.take((self._num_rows, values.shape[0], values.shape[2]), values.dtype)
        at, stop = start, start + keys.shape[1]
        while at < stop:  # page by page: rows of one page are neighbours
            page, within = divmod(at, self._page_tokens)
            count = min(stop - at, self._page_tokens - within)
            row = pages[page] * self._page_tokens + within
            source = slice(at - start, at - start + count)
            self._keys[row : row + count] = keys[:, source].transpose(0, 1)
            self._values[row : row + count] = values[:, source].transpose(0, 1)
            at += count

    def read(self, pages: list[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens ``[start, stop)``, each ``(heads, stop - start, width)``.

        A view where the pages are neighbours, a gathered copy otherwise.
        """
        assert self._keys is not None and self._values is not None, "read before the first append"
        first, last = start // self._page_tokens, (stop - 1) // self._page_tokens
        within = slice(start - first * self._page_tokens, stop - first * self._page_tokens)
        ids = pages[first : last + 1]
        keys, values = (self._rows(tensor, ids)[within].transpose(0, 1) for tensor in (self._keys, self._values))
        return keys, values

    def page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``(page_tokens, heads, width)`` and values of one page, as views to read or to fill."""
        assert self._keys is not None and self._values is not None, "no page was written yet"
        rows = slice(page * self._page_tokens, (page + 1) * self._page_tokens)
        return self._keys[rows], self._values[rows]

    def _rows(self, tensor: torch.Tensor, ids: list[int]) -> torch.Tensor:
        size = self._page_tokens
        if all(after - before == 1 for before, after in pairwise(ids)):
            return tensor[ids[0] * size : (ids[-1] + 1) * size]
        paged = tensor.view(-1, size, *tensor.shape[1:])
        return paged[torch.tensor(ids, device=tensor.device)].flatten(0, 1)
