"""Pages of suspended sequences, on disk: one file without a name, gone with the process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

import torch

from layerstream.kv.shape import PageShape

logger = logging.getLogger(__name__)


class Swapped(Protocol):
    """A layer whose pages, or slots, can be kept elsewhere: bytes of one of them as two tensors."""

    @property
    def shape(self) -> PageShape | None:
        """What a page has; ``None``: nothing was written yet."""
        ...

    def page(self, page: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors in host memory, to be left as they are."""
        ...

    def fill(self, page: int, decode: Callable[[torch.Tensor, torch.Tensor], None], /) -> None:
        """Have *decode* write what :meth:`page` would give."""
        ...


class PageSwap:
    """Room for pages, or for slots of recurrent layers, in a file in *folder* (``None``: where temporary files go).

    Every page of all *states* has the same size, so the file is an array of places; those that were dropped are used
    again. Whoever writes gives its pages a number. Reading and writing happen on the caller's thread, between sweeps.
    """

    def __init__(self, states: Sequence[Swapped], folder: Path | None = None) -> None:
        self._states = states
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._num_slots = 0
        self._page_size: int | None = None
        self._slots: dict[int, list[int]] = {}
        self.written_pages = 0

    def write(self, number: int, pages: Sequence[int]) -> bool:
        """Keep *pages* under *number*; False if the disk has no room for them."""
        assert number not in self._slots, "pages are kept once"
        slots = [self._free.pop() if self._free else self._new_slot() for _ in pages]
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  # kept until close
            for page, slot in zip(pages, slots, strict=True):
                self._file.seek(slot * self._page_bytes())
                for data in self._pieces(page):
                    self._file.write(data)
        except OSError as error:
            logger.warning("a suspended answer is going to be computed again: %s", error)
            self._free.extend(slots)
            return False
        self.written_pages += len(pages)
        self._slots[number] = slots
        return True

    def read(self, number: int, first: int, pages: Sequence[int]) -> bool:
        """Put the pages of *number*, from *first* on, into *pages*; False if the disk, or nobody, has them."""
        if self._file is None or number not in self._slots:
            return False
        try:
            for page, slot in zip(pages, self._slots[number][first:], strict=True):
                self._file.seek(slot * self._page_bytes())
                for state in self._states:
                    if state.shape:
                        state.fill(page, self._take)
        except OSError as error:
            logger.warning("a suspended answer is computed again: %s", error)
            return False
        return True

    def drop(self, number: int) -> None:
        """Let the slots of *number*, if there are any, be used again."""
        self._free.extend(self._slots.pop(number, ()))

    def close(self) -> None:
        """Remove the file. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _new_slot(self) -> int:
        self._num_slots += 1
        return self._num_slots - 1

    def _page_bytes(self) -> int:
        if self._page_size is None:
            self._page_size = sum(len(data) for data in self._pieces(0))
        return self._page_size

    def _pieces(self, page: int) -> list[memoryview]:
        """The bytes of *page*, layer by layer, keys before values; layers that keep nothing have none."""
        return [_bytes(tensor) for state in self._states if state.shape for tensor in state.page(page)]

    def _take(self, *tensors: torch.Tensor) -> None:
        """Read what comes next in the file into *tensors*."""
        for data in map(_bytes, tensors):
            got = self._file.readinto(data)  # type: ignore[union-attr]
            assert got == len(data), "a page was written whole"


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
