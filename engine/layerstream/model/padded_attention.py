"""Attention of single rows by batched products over padded blocks: for what no ragged kernel takes.

That is a soft cap (Gemma 2), sinks in fp32 (gpt-oss), and devices without those kernels. Rows go in groups of
:data:`GROUP`, keys in tiles of a constant size, padded, so that products have one shape whoever is in the group. What
they are gathered into has the size of half the pool at most. Tiles are joined as FlashAttention joins its blocks (Dao
et al., 2022, equation 3): a tile in which a row sees nothing changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from layerstream.kv.readings import ReadingTensors

GROUP = 16  # rows
MOST_KEYS = 512  # of a tile


def attend_padded(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    call: ReadingTensors,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``(n, heads, width of values)`` of queries ``(n, heads, width)``, which see all of their keys."""
    num_rows, kv_heads = len(queries), keys.shape[1]
    padded = F.pad(queries, (0, 0, 0, 0, 0, -num_rows % GROUP)).unflatten(1, (kv_heads, -1))
    tile = tile_keys(len(keys))
    column = None if sinks is None else sinks.float().view(1, kv_heads, -1, 1)
    groups = [
        _group(padded[start : start + GROUP], keys, values, _tiles(call, start, tile), scale, softcap, column)
        for start in range(0, num_rows, GROUP)
    ]
    return (groups[0] if len(groups) == 1 else torch.cat(groups)).flatten(1, 2)[:num_rows]


def tile_keys(pool_rows: int) -> int:
    """Keys of a tile, a power of two; it follows from the size of the pool."""
    return min(MOST_KEYS, 1 << max(0, (pool_rows // (2 * GROUP)).bit_length() - 1))


def _group(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Iterator[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Of queries ``(GROUP, KV heads, group, width)``: scores in the compute dtype, their softmax in fp32."""
    most = sums = found = None
    for rows, hidden in tiles:
        some_keys = keys.index_select(0, rows).view(GROUP, -1, *keys.shape[1:]).permute(0, 2, 3, 1)
        some_values = values.index_select(0, rows).view(GROUP, -1, *values.shape[1:]).transpose(1, 2)
        scores = torch.matmul(queries, some_keys).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        top = scores.amax(dim=-1, keepdim=True)
        if most is None or sums is None or found is None:
            if sinks is not None:
                top = torch.maximum(top, sinks)
            weights = torch.exp(scores - top)
            sums = weights.sum(dim=-1, keepdim=True)
            if sinks is not None:
                sums = sums + torch.exp(sinks - top)
            found = torch.matmul(weights.to(values.dtype), some_values).float()
        else:
            top = torch.maximum(most, top)
            weights, kept = torch.exp(scores - top), torch.exp(most - top)
            sums = sums * kept + weights.sum(dim=-1, keepdim=True)
            found = found * kept + torch.matmul(weights.to(values.dtype), some_values).float()
        most = top
    assert found is not None and sums is not None, "every row sees itself"
    return (found / sums).to(values.dtype)


def _tiles(call: ReadingTensors, start: int, tile: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For the group from row *start* on, tile by tile: the pool's rows ``(GROUP * tile,)``, and which of them a row
    does not see, ``(GROUP, 1, 1, tile)``. They are made once for all layers that see alike."""
    known = call.tiles.get(start)
    if known is None:
        known = call.tiles[start] = list(_make_tiles(call, start, tile))
    return iter(known)


def _make_tiles(call: ReadingTensors, start: int, tile: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    queries = call.reading.queries[start : start + GROUP]
    missing = GROUP - len(queries)
    begins = F.pad(call.key_begins[start : start + len(queries)], (0, missing))[:, None]
    lengths = F.pad(call.lengths[start : start + len(queries)], (0, missing), value=1)[:, None]
    for first in range(0, max(query.length for query in queries), tile):
        columns = torch.arange(first, first + tile, dtype=torch.int32, device=begins.device)[None]
        rows = (begins + torch.minimum(columns, lengths - 1)).view(-1)
        if call.keys is not None:
            rows = call.keys.index_select(0, rows)
        yield rows, (columns >= lengths)[:, None, None]
