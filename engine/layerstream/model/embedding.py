"""Token embeddings: a gather of rows from disk, never a resident matrix (unless everything is resident)."""

from __future__ import annotations

import torch

from layerstream.checkpoint.names import PackedSource, Source
from layerstream.core.sizes import PAGE
from layerstream.errors import UnsupportedFormat
from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import DirectReader, ReadRequest
from layerstream.streaming.loader import Countdown

_DEMAND = 0  # before scheduled reads: the sweep cannot start without it


class EmbeddingRows:
    """Rows of the embedding matrix, ``(vocabulary, hidden)`` on disk.

    Rows that are stored quantised are decoded after they were read.

    Args:
        resident: the whole matrix in the compute dtype, where it is in memory anyway (a tied, resident head).
        max_rows: distinct rows one lookup may ask for.

    Attributes:
        num_rows: that the matrix has.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        reader: DirectReader,
        *,
        max_rows: int,
        resident: torch.Tensor | None = None,
    ) -> None:
        if isinstance(source, PackedSource) and len(source.planes) != 1:
            raise UnsupportedFormat(
                f"{source.name!r} is stored as {source.codec.name}, whose rows cannot be gathered one by one; "
                "use a version of the model whose embedding is not quantised"
            )
        self.num_rows = source.shape[0]
        self._source = source
        self._dtype = dtype
        self._reader = reader
        self._resident = resident
        self._row_bytes = source.num_bytes // source.shape[0]
        self._arena = None if resident is not None else Arena(max_rows * self._row_bytes)

    def gather(self, token_ids: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The distinct rows among *token_ids*, ``(distinct, hidden)``, and each token's index among them.

        Raises:
            ReadError: a row could not be read.
        """
        distinct = sorted(set(token_ids))
        index_of = {token: index for index, token in enumerate(distinct)}
        indices = [index_of[token] for token in token_ids]
        if self._resident is not None:
            return self._resident[torch.tensor(distinct, device=self._resident.device)], indices
        stored = self._read(distinct)
        if not isinstance(self._source, PackedSource):
            return stored.view(self._source.dtype).view(len(distinct), -1).to(self._dtype), indices
        rows = torch.empty((len(distinct), self._source.shape[1]), dtype=self._dtype)
        (name,) = self._source.planes
        self._source.codec.decode({name: stored.view(len(distinct), -1)}, 0, rows)
        return rows, indices

    def _read(self, distinct: list[int]) -> torch.Tensor:
        """The bytes of rows *distinct*, one after the other."""
        assert self._arena is not None
        countdown = Countdown(len(distinct))
        for index, token in enumerate(distinct):
            at = token * self._row_bytes
            piece = next(p for p in self._source.pieces if 0 <= at - p.destination_offset < p.num_bytes)
            extent = piece.entry.extent
            start = extent.offset + piece.source_offset + at - piece.destination_offset
            first = start // PAGE * PAGE
            needed = start + self._row_bytes - first
            copies = ((start - first, index * self._row_bytes, self._row_bytes),)
            request = ReadRequest(extent.path, first, -(-needed // PAGE) * PAGE, needed, None, copies)
            self._reader.submit(request, self._arena.view, 0, countdown, priority=_DEMAND)
        countdown.wait()
        return self._arena.tensor[: len(distinct) * self._row_bytes]
