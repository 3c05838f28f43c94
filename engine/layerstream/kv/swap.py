"""Pages of suspended sequences, on disk: one file without a name, gone with the process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from layerstream.kv.state import LayerState

logger = logging.getLogger(__name__)


class PageSwap:
    """Room for pages in a file in *folder* (``None``: where temporary files go).

    Every page of every layer has the same size, so the file is an array of slots; those that were dropped are used
    again. Whoever writes gives its pages a number. Reading and writing happen on the caller's thread, between sweeps.
    """

    def __init__(self, states: Sequence[LayerState], folder: Path | None = None) -> None:
        self._states = states
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._num_slots = 0
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
                for data in self._pieces(page):
                    got = self._file.readinto(data)  # type: ignore[attr-defined]
                    assert got == len(data), "a page was written whole"
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
        return sum(len(data) for data in self._pieces(0))

    def _pieces(self, page: int) -> list[memoryview]:
        """The bytes of *page*, layer by layer, keys before values; layers that keep nothing have none."""
        tensors = [tensor for state in self._states if state.shape for tensor in state.page(page)]
        return [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors]
