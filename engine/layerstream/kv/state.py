"""The tensors behind the pages: per layer, what transformers' ``Cache.update`` receives.

Layout: one tensor per layer and kind, ``(num_pages · page_tokens, heads, width)``, so that neighbouring pages are
neighbouring rows and a contiguous run of pages is one view. Keys and values are whatever the model caches: after RoPE,
per KV head; for MLA the latents (one head). Memory is reserved when a layer is first written and touched as pages fill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from math import prod
from typing import Any, TypeAlias

import torch
from torch.nn.functional import pad

from layerstream.core.sizes import PAGE
from layerstream.hardware.arena import Arena, Populating
from layerstream.hardware.device import Device
from layerstream.kv.pages import LAYERS_IN_HAND
from layerstream.kv.shape import PageShape

Neighbours: TypeAlias = tuple[tuple[int, int], ...]
"""Pages in order, as first and count of those that lie side by side."""


class PageMemory:
    """The memory that the pages of all layers lie in: *num_bytes* in one piece, handed out once.

    Touching a page for the first time costs more than filling it, so :meth:`populate` does it ahead, while the engine
    reads its weights and the processor is idle. Where a *device* copies from and to it, it is pinned.
    """

    def __init__(self, num_bytes: int, device: Device | None = None) -> None:
        self._arena = Arena(num_bytes)
        self._used = 0
        self._device = device
        self._populating: Populating | None = None
        if device is not None:
            device.pin(self._arena)

    def take(self, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor, page-aligned; from elsewhere if there is not enough left."""
        num_bytes = prod(shape) * dtype.itemsize
        start, stop = self._used, self._used + num_bytes
        if stop > self._arena.num_bytes:
            return Arena(num_bytes).tensor[:num_bytes].view(dtype).view(shape)
        self._used = -(-stop // PAGE) * PAGE
        return self._arena.tensor[start:stop].view(dtype).view(shape)

    def populate(self) -> None:
        """Touch all of it, on a thread that ends when this is closed."""
        self._populating = Populating(self._arena, "populate")

    def close(self) -> None:
        """Unpin it. Idempotent."""
        if self._populating is not None:
            self._populating.close()
        device, self._device = self._device, None
        if device is not None:
            device.unpin(self._arena)


class Transit:
    """Room for pages that stream past: *num_slots* pages of the layers in hand, which take turns; *lasting* ones, which
    later layers attend to as well, have a place of their own."""

    def __init__(self, num_slots: int, page_tokens: int, lasting: Collection[int] = ()) -> None:
        self._num_rows = num_slots * page_tokens
        self._lasting = lasting
        self._arenas: dict[int, Arena] = {}
        self._views: dict[tuple[int, PageShape], tuple[torch.Tensor, torch.Tensor]] = {}

    def tensors(self, layer: int, shape: PageShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``(num_slots · page_tokens, heads, width)`` and values of *layer*, valid while it is in hand."""
        turn = LAYERS_IN_HAND + layer if layer in self._lasting else layer % LAYERS_IN_HAND
        if (turn, shape) not in self._views:
            self._views[turn, shape] = self._view(turn, shape)
        return self._views[turn, shape]

    def _view(self, turn: int, shape: PageShape) -> tuple[torch.Tensor, torch.Tensor]:
        key_bytes, value_bytes = self._num_rows * shape.key_bytes, self._num_rows * shape.value_bytes
        arena = self._arenas.get(turn)
        if arena is None or arena.num_bytes < key_bytes + value_bytes:
            arena = self._arenas[turn] = Arena(key_bytes + value_bytes)
        return rows_in(arena.tensor, self._num_rows, shape)


class PagedRows(ABC):
    """Keys and values of one layer, as the compute writes and reads them: rows of pages."""

    def __init__(self, page_tokens: int, border: int) -> None:
        self._page_tokens = page_tokens
        self._border = border  # pages from here on lie elsewhere
        self._has_room = False

    def append(self, pages: list[int], start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens ``[start, start + T)`` of the sequence that owns *pages*.

        Args:
            keys: ``(heads, T, width)``.
            values: ``(heads, T, width of values)``.
        """
        if not self._has_room:
            self.reserve(shape_of(keys, values))
        at = 0
        for rows, (all_keys, all_values) in self._places(pages, start, start + keys.shape[1]):
            source = slice(at, at := at + rows.stop - rows.start)
            all_keys[rows] = keys[:, source].transpose(0, 1)
            all_values[rows] = values[:, source].transpose(0, 1)

    def read(
        self, pages: list[int], start: int, stop: int, known: dict[Any, Neighbours] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens ``[start, stop)``, each ``(heads, stop - start, width)``.

        A view where the pages are neighbours, a gathered copy otherwise; zeros where *pages* do not reach.

        Args:
            known: which pages are neighbours, as other layers found it, by their list and place in it.
        """
        first, last = start // self._page_tokens, (stop - 1) // self._page_tokens
        within = slice(start - first * self._page_tokens, stop - first * self._page_tokens)
        name = id(pages), first, last
        found = None if known is None else known.get(name)
        if found is None:
            found = tuple(runs(pages[first : last + 1], self._border))
            if known is not None:
                known[name] = found
        keys, values = self._gather(found)
        if within.stop > len(keys):
            missing = (0, 0, 0, 0, 0, within.stop - len(keys))
            keys, values = pad(keys, missing), pad(values, missing)
        return keys[within].transpose(0, 1), values[within].transpose(0, 1)

    def clear(self, pages: list[int], start: int, stop: int) -> None:
        """Write zeros to tokens ``[start, stop)``, as far as *pages* reach."""
        for rows, tensors in self._places(pages, start, min(stop, len(pages) * self._page_tokens)):
            for tensor in tensors:
                tensor[rows] = 0

    def rows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of *count* neighbouring pages, to be left as they are."""
        rows, (keys, values) = self._locate(first, count)
        return keys[rows], values[rows]

    @abstractmethod
    def reserve(self, shape: PageShape) -> None:
        """Make room for tokens of *shape*, unless there is."""

    @abstractmethod
    def _locate(self, first: int, count: int) -> tuple[slice, tuple[torch.Tensor, torch.Tensor]]:
        """Where *count* neighbouring pages from *first* on are: rows, and keys and values that they are rows of."""

    def _places(
        self, pages: list[int], start: int, stop: int
    ) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor]]]:
        """Where tokens ``[start, stop)`` are, in order: rows, and keys and values that they are rows of."""
        first, within = divmod(start, self._page_tokens)
        left = stop - start
        for page, count in runs(pages[first : -(-stop // self._page_tokens)] if left > 0 else (), self._border):
            rows, tensors = self._locate(page, count)
            begin = rows.start + within
            end = min(rows.stop, begin + left)
            yield slice(begin, end), tensors
            left, within = left - (end - begin), 0

    def _gather(self, neighbours: Neighbours) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of pages that are *neighbours*: a view where all are."""
        pieces = []
        for first, count in neighbours:
            rows, (keys, values) = self._locate(first, count)
            pieces.append((keys[rows], values[rows]))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([keys for keys, _ in pieces]), torch.cat([values for _, values in pieces])


class LayerState(PagedRows):
    """Keys and values of one layer for all pages; pages from *num_pages* on are slots of *transit*.

    Attributes:
        on_change: told of every page that is about to be written to, or may be.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        memory: PageMemory,
        layer: int = 0,
        transit: Transit | None = None,
    ) -> None:
        super().__init__(page_tokens, num_pages)
        self.on_change: Callable[[int], None] | None = None
        self._memory = memory
        self._layer = layer
        self._transit = transit
        self._num_rows = num_pages * page_tokens
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def page_bytes(self) -> int:
        """Of one page, keys and values; 0 before anything was written."""
        shape = self.shape
        return 0 if shape is None else self._page_tokens * (shape.key_bytes + shape.value_bytes)

    @property
    def shape(self) -> PageShape | None:
        """What one token takes; ``None`` before anything was written."""
        if self._keys is None or self._values is None:
            return None
        return shape_of(self._keys.transpose(0, 1), self._values.transpose(0, 1))

    def reserve(self, shape: PageShape) -> None:
        """Make room for tokens of *shape*, unless there is.

        Raises:
            ValueError: there is room for tokens of another shape.
        """
        if self._keys is None:
            dtype = getattr(torch, shape.dtype)
            self._keys = self._memory.take((self._num_rows, shape.key_heads, shape.key_width), dtype)
            self._values = self._memory.take((self._num_rows, shape.value_heads, shape.value_width), dtype)
            self._has_room = True
        elif shape != self.shape:
            raise ValueError(f"pages of {shape} do not fit among those of {self.shape}")

    def append(self, pages: list[int], start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As every :class:`PagedRows`."""
        if self.on_change is not None:
            for page in pages[start // self._page_tokens : -(-(start + keys.shape[1]) // self._page_tokens)]:
                self.on_change(page)
        super().append(pages, start, keys, values)

    def page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``(page_tokens, heads, width)`` and values of one page, as views to read or to fill."""
        if self.on_change is not None:
            self.on_change(page)
        return self.rows(page, 1)

    def fill(self, page: int, decode: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        """Have *decode* write keys and values of *page*."""
        decode(*self.page(page))

    def row_range(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """*count* rows of frames from row *first* on, as views."""
        assert self._keys is not None and self._values is not None, "no page was written yet"
        return self._keys[first : first + count], self._values[first : first + count]

    def scatter(self, targets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows ``(n, heads, width)`` to rows *targets* of frames; nobody is told."""
        assert self._keys is not None and self._values is not None, "no page was written yet"
        self._keys.index_copy_(0, targets, keys)
        self._values.index_copy_(0, targets, values)

    def copy_page(self, source: int, target: int) -> None:
        """Make *target* a copy of *source*."""
        for found, copied in zip(self.page(source), self.page(target), strict=True):
            copied.copy_(found)

    def _locate(self, first: int, count: int) -> tuple[slice, tuple[torch.Tensor, torch.Tensor]]:
        assert self._keys is not None and self._values is not None, "no page was written yet"
        tensors = self._keys, self._values
        if first >= self._border:
            assert self._transit is not None and self.shape is not None
            tensors = self._transit.tensors(self._layer, self.shape)
            first -= self._border
        return slice(first * self._page_tokens, (first + count) * self._page_tokens), tensors


def rows_in(
    memory: torch.Tensor, num_rows: int, shape: PageShape, alignment: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``(num_rows, heads, width)`` at the beginning of *memory*, in bytes, and values behind them, which begin at
    a multiple of *alignment*."""
    dtype = getattr(torch, shape.dtype)
    key_bytes, value_bytes = num_rows * shape.key_bytes, num_rows * shape.value_bytes
    start = -(-key_bytes // alignment) * alignment
    keys, values = memory[:key_bytes].view(dtype), memory[start : start + value_bytes].view(dtype)
    return (
        keys.view(num_rows, shape.key_heads, shape.key_width),
        values.view(num_rows, shape.value_heads, shape.value_width),
    )


def shape_of(keys: torch.Tensor, values: torch.Tensor) -> PageShape:
    """What a token of ``(heads, T, width)`` *keys* and *values* takes."""
    dtype = str(keys.dtype).removeprefix("torch.")
    return PageShape(keys.shape[0], keys.shape[2], values.shape[0], values.shape[2], dtype)


def runs(ids: Iterable[int], border: int) -> Iterator[tuple[int, int]]:
    """Neighbours among *ids*, as first and count; none reaches across *border*."""
    first, count = -1, 0
    for page in ids:
        if count and page == first + count and page != border:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def merged(neighbours: Iterable[tuple[int, int]], gap: int) -> Iterator[tuple[int, int]]:
    """*neighbours*, as :func:`runs` gives them, joined where at most *gap* others lie between two of them."""
    first, count = -1, 0
    for start, more in neighbours:
        if count and start - (first + count) <= gap:
            count = start + more - first
            continue
        if count:
            yield first, count
        first, count = start, more
    if count:
        yield first, count
