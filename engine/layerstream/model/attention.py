"""Ragged attention for transformers' modules: every sequence alone, against its own pages.

Registered as the attention implementation ``"layerstream"``. Masks are ours too, because a packed row of several
sequences has none that transformers could build: causality, ``sliding_window``, ``softcap``, ``s_aux`` (sinks) and
what otherwise only the mask carries (Llama 4's ``attention_chunk_size``) are applied here.

What a row attends to depends on its position alone, and the kernel is called with the shape of its own span, so
neighbours in the sweep change no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from layerstream.model.context import SweepContext, current
from layerstream.sweep import Span

IMPLEMENTATION = "layerstream"
_MANUAL_LIMIT = 2**24  # scores per call above which sinks and soft caps go one KV head at a time


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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the rows in hand.

    Args:
        query: ``(1, heads, rows, width)``, after RoPE.
        key, value: what ``PagedCache.update`` returned, or, for latent models, its expansion
            ``(1, heads, past + new, width)``.

    Returns:
        ``(1, rows, heads, width of values)`` and ``None`` for the weights.
    """
    context = current()
    layer: int = module.layer_idx  # type: ignore[assignment]
    window, chunk = _locality(module, layer, sliding_window)
    latent = getattr(module, "kv_lora_rank", None) is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = query.new_zeros((query.shape[2], query.shape[1], value.shape[3]))
    for row, span in context.spans():
        rows = slice(row, row + len(span))
        first = _first_visible(span.start, window, chunk)
        if latent:
            keys, values = key[0, :, first : span.stop], value[0, :, first : span.stop]
        else:
            keys, values = context.states[layer].read(span.sequence.pages, first, span.stop)
        mask = _mask(context, span, first, window, chunk, query.shape[1] // keys.shape[0], query.device)
        grouped = query[0, :, rows].reshape(keys.shape[0], -1, query.shape[3])  # (kv heads, group · T, width)
        if softcap is None and s_aux is None:
            result = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], mask, scale=scale)[0]
        else:
            result = _attend_manually(grouped, keys, values, mask, scale, softcap, s_aux)
        out[rows] = result.reshape(query.shape[1], len(span), -1).transpose(0, 1)
    return out[None], None


def _locality(module: torch.nn.Module, layer: int, sliding_window: int | None) -> tuple[int | None, int | None]:
    """Sliding window and attention chunk of this layer, each ``None`` where it has none."""
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    kind = layer_types[layer] if layer_types and layer < len(layer_types) else None
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    if sliding_window is None and kind == "sliding_attention":
        sliding_window = getattr(config, "sliding_window", None)
    if kind == "full_attention":
        sliding_window = None
    return sliding_window, chunk  # type: ignore[return-value]


def _first_visible(position: int, window: int | None, chunk: int | None) -> int:
    """First position that the token at *position* may see."""
    first = 0
    if window is not None:
        first = max(first, position - window + 1)
    if chunk is not None:
        first = max(first, position // chunk * chunk)
    return first


def _mask(
    context: SweepContext,
    span: Span,
    first: int,
    window: int | None,
    chunk: int | None,
    groups: int,
    device: torch.device,
) -> torch.Tensor | None:
    """``(groups · T, visible)`` booleans, or ``None`` where a single row sees all that was read."""
    if len(span) == 1:
        return None
    key = (span.start, span.stop, first, window, chunk, groups)
    mask = context.masks.get(key)
    if mask is None:
        rows = torch.arange(span.start, span.stop, device=device)[:, None]
        columns = torch.arange(first, span.stop, device=device)[None, :]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
        if chunk is not None:
            mask &= columns // chunk == rows // chunk
        mask = context.masks[key] = mask.repeat(groups, 1)
    return mask


def _attend_manually(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap (Gemma 2) or sinks (gpt-oss), which SDPA has no argument for.

    Shapes: query ``(kv heads, group · T, width)``, keys and values ``(kv heads, L, width)``, sinks ``(heads,)``.
    """
    if query.shape[0] > 1 and query.shape[0] * query.shape[1] * keys.shape[1] > _MANUAL_LIMIT:
        per_head = [None] * query.shape[0] if sinks is None else list(sinks.view(query.shape[0], -1))
        parts = [
            _attend_manually(query[h : h + 1], keys[h : h + 1], values[h : h + 1], mask, scale, softcap, per_head[h])
            for h in range(query.shape[0])
        ]
        return torch.cat(parts)
    scores = (query @ keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        group = sinks.numel() // query.shape[0]
        column = sinks.view(query.shape[0], group, 1).expand(-1, -1, query.shape[1] // group)
        joined = torch.cat([scores, column.reshape(query.shape[0], -1, 1).to(scores.dtype)], dim=-1)
        weights = torch.softmax(joined, dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(values.dtype) @ values
