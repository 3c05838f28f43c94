"""Ragged attention for transformers' modules: every sequence alone, against its own pages.

Registered as the attention implementation ``"layerstream"``. Masks are ours too, because a packed row of several
sequences has none that transformers could build: causality, and the window or chunk that the layer asked a mask of
(:mod:`layerstream.model.trace`), are applied here, as are ``softcap`` and ``s_aux`` (sinks).

What a row attends to depends on its position alone. Rows of a prompt attend in the shape of their whole *chunk*: as
many rows as that has, zeros where a row was computed before or the prompt has ended, over keys up to its end, which are
zeros and masked where there are none. So no bit depends on where a stored prefix parts a chunk, on where the prompt
ends, or on neighbours. A guess attends like the decode row that it would be if it were right: one row,
over its sequence's keys with its own path in their place, so being verified in a tree changes no bit either.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from layerstream.core.sequence import Sequence
from layerstream.core.sight import Sight
from layerstream.core.sweep import Span
from layerstream.kv.on_device import DeviceKV
from layerstream.model.context import SweepContext, current
from layerstream.model.device_attention import Formula, Seen, attend_on_device, attend_rows

IMPLEMENTATION = "layerstream"
SCORES_AT_ONCE = 2**20  # 4 MiB
PRODUCT_ROWS = 16


def register() -> None:
    """Make ``attn_implementation="layerstream"`` known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the rows in hand.

    Args:
        query: ``(1, heads, rows, width)``, after RoPE.
        key, value: what ``PagedCache.update`` returned, perhaps in an earlier layer; it is read from the pages. In a
            layer that expands what it cached, the expansion ``(1, heads, past + new, width)``.

    Returns:
        ``(1, rows, heads, width of values)`` and ``None`` for the weights.
    """
    context = current()
    layer = context.layers[module.layer_idx]  # type: ignore[index]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    formula = Formula(scale, softcap, s_aux, layer.sight, context.prefers_flash)
    if context.pools is not None and not layer.expands:
        return _attend_to_pool(context, context.pools, layer.state, query, formula)[None], None
    past = None if layer.expands else _Past(context, layer.state, layer.sight)
    out = query.new_zeros((query.shape[2], query.shape[1], value.shape[3]))
    for row, span in context.spans():
        rows = slice(row, row + len(span))
        if past is None:
            start, stop = context.attended(span)
            first = layer.sight.first(start)
            keys, values = key[0, :, first:stop], value[0, :, first:stop]
        else:
            keys, values = past.read(span)
        out[rows] = _attend_to_span(context, span, query[0, :, rows], keys, values, formula)
    return out[None], None


def _attend_to_pool(
    context: SweepContext, pools: DeviceKV, number: int, query: torch.Tensor, formula: Formula
) -> torch.Tensor:
    """``(rows, heads, width of values)`` of the rows in hand, over the KV of layer *number* where that is: another
    device may compute with what a layer before kept, and rows take less to cross than their keys."""
    pool = pools.layers[number].pool
    device = pool[0].device
    if formula.sinks is not None:
        formula = dataclasses.replace(formula, sinks=formula.sinks.to(device))
    parts = []
    for row, block in context.active:
        rows = query[0, :, row : row + block.num_rows].transpose(0, 1).to(device)
        found = None
        for wave in pools.waves(number, block):
            found = attend_rows(rows, pool, wave.calls[formula.sight], formula, found)
        assert found is not None, "a block attends"
        parts.append(found)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(query.device)


def _attend_to_span(
    context: SweepContext, span: Span, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, formula: Formula
) -> torch.Tensor:
    """``(T, heads, width of values)`` of query ``(heads, T, width)``, over the keys up to where the span attends."""
    sight, (start, stop) = formula.sight, context.attended(span)
    seen = Seen(start, stop, sight.first(start), sight.window, sight.chunk)
    if not query.is_cpu:
        return attend_on_device(query, keys, values, seen, formula)
    if len(span) < stop - start:
        query = F.pad(query, (0, 0, span.start - start, stop - span.stop))
    mask = _mask(context, seen, query.shape[0] // keys.shape[0])
    grouped = query.reshape(keys.shape[0], -1, query.shape[2])  # (kv heads, group · T, width)
    if formula.softcap is None and formula.sinks is None and not _prefers_products(query, stop - start):
        found = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], mask, scale=formula.scale)[0]
    else:
        first_masked = start if sight == Sight() else 0
        found = _attend_by_head(
            grouped, keys, values, mask, first_masked, formula.scale, formula.softcap, formula.sinks
        )
    found = found.reshape(query.shape[0], stop - start, -1)
    return found[:, span.start - start : span.stop - start].transpose(0, 1)


class _Past:
    """Keys and values of the sequences in hand, each gathered once for all of its rows."""

    def __init__(self, context: SweepContext, number: int, sight: Sight) -> None:
        self._context = context
        self._number = number
        self._sight = sight
        bounds: dict[Sequence, tuple[int, int]] = {}
        for _, span in context.spans():
            start, end = context.attended(span)
            first, stop = bounds.get(span.sequence, (start, end))
            bounds[span.sequence] = min(first, sight.first(start)), max(stop, end)
        state = context.states[number]
        self._first = {sequence: first for sequence, (first, _) in bounds.items()}
        self._gathered = {
            sequence: state.read(sequence.pages, *bound, context.neighbours) for sequence, bound in bounds.items()
        }
        self._placed: dict[Sequence, tuple[int, ...]] = {}

    def read(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """``(heads, L, width)`` from the first position that *span* sees to where it attends, its own path in it if it
        is a guess."""
        sequence, start = span.sequence, self._first[span.sequence]
        begin, stop = self._context.attended(span)
        first = self._sight.first(begin)
        keys, values = self._gathered[sequence]
        if span.is_drafted:
            self._placed[sequence] = self._context.drafted.place(
                self._number, span, keys, values, start, self._placed.get(sequence, ())
            )
        return keys[:, first - start : stop - start], values[:, first - start : stop - start]


def _mask(context: SweepContext, seen: Seen, groups: int) -> torch.Tensor | None:
    """``(groups · T, visible)`` booleans, or ``None`` where a single row sees all that was read."""
    if seen.is_everything:
        return None
    mask = context.masks.get((seen, groups))
    if mask is None:
        mask = context.masks[seen, groups] = seen.mask(torch.device("cpu")).repeat(groups, 1)
    return mask


def _attend_by_head(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    first_masked: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention as matrix products, one KV head after the other, a few rows at a time so that scores stay in the cache.

    With a soft cap (Gemma 2) or sinks (gpt-oss), which SDPA has no argument for; and in bf16, where SDPA's kernel for
    the CPU takes three times as long. Scores are rounded to the compute dtype, as transformers' eager attention does.

    Shapes: query ``(kv heads, group · T, width)``, keys and values ``(kv heads, L, width)``, sinks ``(heads,)``.
    Columns before *first_masked* are seen by all rows.
    """
    num_heads, num_rows, num_columns = query.shape[0], query.shape[1], keys.shape[1]
    out = query.new_empty((num_heads, num_rows, values.shape[2]))
    column = None if sinks is None else _sink_column(sinks, num_heads, num_rows)
    hidden = None if mask is None else ~mask[:, first_masked:]
    step = max(16, SCORES_AT_ONCE // num_columns // 16 * 16)
    for head in range(num_heads):
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            scores = F.linear(query[head, rows], keys[head]).float().mul_(scale)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if hidden is not None:
                scores[:, first_masked:].masked_fill_(hidden[rows], float("-inf"))
            if column is not None:
                scores = torch.cat([scores, column[head, rows]], dim=-1)
            weights = torch.softmax(scores, dim=-1)[:, :num_columns].to(values.dtype)
            torch.mm(weights, values[head], out=out[head, rows])
    return out


def _sink_column(sinks: torch.Tensor, num_heads: int, num_rows: int) -> torch.Tensor:
    """``(kv heads, group · T, 1)`` in fp32: each query head's sink beside its rows."""
    group = sinks.numel() // num_heads
    column = sinks.float().view(num_heads, group, 1).expand(-1, -1, num_rows // group)
    return column.reshape(num_heads, num_rows, 1)


def _prefers_products(query: torch.Tensor, num_rows: int) -> bool:
    """Whether matrix products beat SDPA: in bf16 where the processor has instructions for it, from 16 tokens on."""
    return query.dtype == torch.bfloat16 and num_rows >= PRODUCT_ROWS and has_bf16_products()


@functools.cache
def has_bf16_products() -> bool:
    """Whether this processor multiplies matrices in bf16 by instructions of its own."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
