"""Attention on an accelerator: all rows of a block in one call of a kernel.

| what attends | how |
|---|---|
| rows whose kernel is there: :mod:`layerstream.model.ragged_kernels` | one call, keys where they lie |
| rows that see all of their keys, with a soft cap, or where that is not so | batched products over padded blocks |
| spans of several rows, likewise | span by span: flash-attn where it is installed, SDPA, products some rows at a time |
| layers that expand what they cached | as those spans, of one sequence |

Rows that stand alone see all of their keys; so their heads that share keys are the rows of a query. With sinks the
kernel attends without them, and what it found shrinks by their share: a sum of exponentiated scores *s* with a sink *b*
more makes of it ``sigmoid(log s - b)``.

Nothing here has the size of prompt times prompt: a span is one chunk of a prompt, or one token, and products are cut
to :data:`SCORES_AT_ONCE`. Calls have the rows of a block, whoever they are, or the shape of their own span: neighbours
change no bit.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerstream.core.sight import Sight
from layerstream.errors import MissingExtra
from layerstream.hardware.accelerators import can_run
from layerstream.kv.device_rows import Query
from layerstream.kv.readings import ReadingTensors
from layerstream.model.padded_attention import attend_padded
from layerstream.model.ragged_kernels import Kernel, Ragged, choose

VERSION = 2  # of the formulas that devices compute by: stored KV is another's where it differs
SCORES_AT_ONCE = 2**23  # 32 MiB in fp32
FLASH_WIDTH = 256  # of a head, at most
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True, slots=True)
class Formula:
    """What a layer makes of scores: ``softmax(cap(scale * scores), with sinks)``.

    Attributes:
        sight: what it lets a row see.
        prefers_flash: by flash-attn, where it can.
    """

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    sight: Sight
    prefers_flash: bool = False


def attend_rows(
    queries: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    calls: tuple[ReadingTensors, ...],
    formula: Formula,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of one block.

    Args:
        queries: ``(rows, heads, width)``.
        pool: keys and values ``(pool rows, KV heads, width)``.
        calls: who attends.
        out: what an earlier wave of the block gave; zeros elsewhere.

    Returns:
        ``(rows, heads, width of values)``.
    """
    for call in calls:
        some = queries if call.rows is None else _chosen(queries, call.rows)
        found = _attend(some, pool, call, formula)
        if call.rows is None:
            return found
        if out is None:
            out = queries.new_zeros((*queries.shape[:2], found.shape[2]))
        if isinstance(call.rows, slice):
            out[call.rows] = found
        else:
            out.index_copy_(0, call.rows, found)
    assert out is not None, "a block has rows"
    return out


def _chosen(tensor: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _attend(
    queries: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], call: ReadingTensors, formula: Formula
) -> torch.Tensor:
    """The rows of one call, ``(rows, heads, width of values)``."""
    kernel = choose(queries, *pool, needs_sums=formula.sinks is not None) if formula.softcap is None else None
    if kernel is None and call.reading.is_alone:
        return attend_padded(queries, *pool, call, formula.scale, formula.softcap, formula.sinks)
    keys, values = pool if call.keys is None else (part.index_select(0, call.keys) for part in pool)
    if kernel is None:
        return _span_by_span(queries, keys, values, call, formula)
    return _ragged(kernel, queries, keys, values, call, formula, most_keys=len(pool[0]))


def _ragged(
    kernel: Kernel,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    call: ReadingTensors,
    formula: Formula,
    most_keys: int,
) -> torch.Tensor:
    """*most_keys* of any query: not those that were gathered, which are neighbours', too."""
    heads, kv_heads, is_alone = queries.shape[1], keys.shape[1], call.reading.is_alone
    group = heads // kv_heads if is_alone else 1
    if group > 1:  # (rows, KV heads, group, width): a group's heads are the rows of its query
        queries = queries.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)
    ragged = Ragged(
        call.ends(group),
        call.key_begins,
        call.lengths,
        call.most_rows * group,
        most_keys,
        has_mask=not is_alone,
        window=formula.sight.window,
    )
    found, sums = kernel(queries, keys, values, ragged, formula.scale)
    if group > 1:
        found = found.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)
    if formula.sinks is None:
        return found
    assert sums is not None, "a kernel was chosen that gives them"
    if group > 1:
        sums = sums.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)
    return (found * torch.sigmoid(sums - formula.sinks)[..., None]).to(found.dtype)


def _span_by_span(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: ReadingTensors, formula: Formula
) -> torch.Tensor:
    """Each query by kernels that take one."""
    parts, row, key = [], 0, 0
    for query in call.reading.queries:
        first = key if query.keys else query.begin
        seen = slice(first, first + query.length)
        parts.append(
            attend_on_device(
                queries[row : row + query.count].transpose(0, 1),
                keys[seen].transpose(0, 1),
                values[seen].transpose(0, 1),
                _seen(query, formula.sight),
                formula,
            )
        )
        row, key = row + query.count, key + query.length
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _seen(query: Query, sight: Sight) -> Seen:
    """Of a query, counted from its first key: it lies in one chunk."""
    return Seen(query.length - query.count, query.length, 0, sight.window, None)


@dataclass(frozen=True, slots=True)
class Seen:
    """What rows ``[start, stop)`` of a sequence see of its positions ``[first, stop)``."""

    start: int
    stop: int
    first: int
    window: int | None
    chunk: int | None

    @property
    def is_everything(self) -> bool:
        """Whether it is one row, which sees all that is there."""
        return self.stop - self.start == 1

    @property
    def is_causal(self) -> bool:
        """Whether rows see all positions up to their own, or a window of them."""
        return self.chunk is None or self.start // self.chunk == (self.stop - 1) // self.chunk

    def mask(self, device: torch.device, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """``(rows, visible)`` booleans, of rows ``[start, stop)`` if only some are wanted."""
        rows = torch.arange(start or self.start, stop or self.stop, device=device)[:, None]
        columns = torch.arange(self.first, self.stop, device=device)[None, :]
        mask = columns <= rows
        if self.window is not None:
            mask &= columns > rows - self.window
        if self.chunk is not None:
            mask &= columns // self.chunk == rows // self.chunk
        return mask


def attend_on_device(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sees: Seen,
    formula: Formula,
) -> torch.Tensor:
    """``(T, heads, width of values)`` for query ``(heads, T, width)``, keys and values ``(kv heads, L, width)``."""
    scale, softcap, sinks = formula.scale, formula.softcap, formula.sinks
    if formula.prefers_flash and sinks is None and sees.is_causal and _suits_flash(query, values):
        return _flash(query, keys, values, sees, scale, softcap)
    shape = query.dtype, query.shape[-1], values.shape[-1]
    if softcap is None and sinks is None and shape not in _NOT_FUSED:
        try:
            return _fused(query, keys, values, sees, scale)
        except RuntimeError as error:
            if "o available kernel" not in str(error):
                raise
            _NOT_FUSED.add(shape)
    return _products(query, keys, values, sees, scale, softcap, sinks)


def resolve_attention(name: str, device: torch.device) -> bool:
    """Whether to prefer flash-attn, where *name* is ``"auto"``, ``"sdpa"`` or ``"flash_attn"``.

    Raises:
        MissingExtra: it was asked for and is not installed.
    """
    is_there = importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attn" and not is_there:
        raise MissingExtra("flash_attn", "flash")
    return name != "sdpa" and is_there and can_run("flash_attn", device)


_NOT_FUSED: set[tuple[torch.dtype, int, int]] = set()


def _fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: Seen, scale: float) -> torch.Tensor:
    """By SDPA. KV heads stand where batches do, query heads that share one where heads do: nothing is copied."""
    kv_heads, num_rows = keys.shape[0], query.shape[1]
    if sees.is_everything:  # the heads of a group are its rows
        grouped = query.reshape(1, kv_heads, -1, query.shape[2])
        with sdpa_kernel(_FUSED):
            found = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        return found.reshape(query.shape[0], 1, -1).transpose(0, 1)
    grouped = query.unflatten(0, (kv_heads, -1))
    of_group = [part[:, None].expand(-1, grouped.shape[1], -1, -1) for part in (keys, values)]
    with sdpa_kernel(_FUSED):
        found = F.scaled_dot_product_attention(grouped, *of_group, attn_mask=sees.mask(query.device), scale=scale)
    return found.reshape(query.shape[0], num_rows, -1).transpose(0, 1)


def _products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sees: Seen,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As transformers' eager attention: scores in the compute dtype, their softmax in fp32."""
    kv_heads, num_rows, width = keys.shape[0], query.shape[1], values.shape[2]
    grouped = query.unflatten(0, (kv_heads, -1))  # (kv heads, group, T, width)
    out = query.new_empty((num_rows, query.shape[0], width))
    step = max(1, SCORES_AT_ONCE // (query.shape[0] * keys.shape[1]))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        scores = torch.matmul(grouped[:, :, rows], keys[:, None].transpose(2, 3)).float().mul_(scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if not sees.is_everything:
            hidden = ~sees.mask(query.device, sees.start + rows.start, sees.start + rows.stop)
            scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]].to(values.dtype)
        found = torch.matmul(weights, values[:, None])  # (kv heads, group, rows, width)
        out[rows] = found.flatten(0, 1).transpose(0, 1)
    return out


def _flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sees: Seen,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """By flash-attn, whose causal mask ends with the last position of both."""
    window = (-1, -1) if sees.window is None else (sees.window - 1, 0)
    found = _flash_attn()(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        softmax_scale=scale,
        causal=True,
        window_size=window,
        softcap=softcap or 0.0,
    )
    return found[0]


def _suits_flash(query: torch.Tensor, values: torch.Tensor) -> bool:
    is_half = query.dtype in {torch.float16, torch.bfloat16}
    return is_half and query.shape[-1] == values.shape[-1] <= FLASH_WIDTH


@functools.cache
def _flash_attn() -> Any:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func
