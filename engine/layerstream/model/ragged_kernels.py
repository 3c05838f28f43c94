"""Attention of queries of different lengths in one call, over keys that lie where they lie.

| kernel | needs |
|---|---|
| ``flash`` | fp16 or bf16, an NVIDIA card from sm_80 on; knows that heads share keys |
| ``efficient`` | any CUDA card; called once for each query head of those that share keys, where there is a mask |

Both are torch's own, called below ``torch.nn.attention``: ``varlen_attn`` takes no start of keys beside their number,
refuses fp32, and launches one kernel more. Both go over a query's keys in order, without splitting them among blocks of
threads, so that the bits of a query are its own. That, and that they give what the formula gives, is tried on the
device itself before they are used: :func:`choose`.

Shapes: queries ``(rows, heads, width)``, keys and values ``(pool rows, KV heads, width)``. Query *i* has rows from
``query_ends[i]`` to ``query_ends[i + 1]`` and keys ``[key_begins[i], key_begins[i] + lengths[i])``; with a mask its
last row sees all of them, and each row before one less.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from layerstream.hardware.accelerators import can_run

logger = logging.getLogger(__name__)

CAUSAL_FROM_THE_END = 2  # ``_efficient_attention_forward``: the last row sees the last key
LEAST_ROWS = 2  # that flash is told of: with one it would split keys, by how many there are


@dataclass(frozen=True, slots=True)
class Ragged:
    """Queries and their keys.

    Attributes:
        query_ends, key_begins: ``(n + 1,)`` int32.
        lengths: ``(n,)`` int32.
        most_rows: of a query, or more.
        most_keys: of a query, or more.
        has_mask: whether rows see only the keys up to their own; else all of their query's.
        window: with a mask, the last so many of those.
    """

    query_ends: torch.Tensor
    key_begins: torch.Tensor
    lengths: torch.Tensor
    most_rows: int
    most_keys: int
    has_mask: bool
    window: int | None = None


class Kernel(Protocol):
    """One of the kernels."""

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ragged: Ragged, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(rows, heads, width of values)``, and the logarithms of the sums of exponentiated scores
        ``(rows, heads)`` in fp32, if the kernel gives them."""
        ...


def flash(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ragged: Ragged, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By FlashAttention."""
    window = -1 if ragged.window is None else ragged.window - 1
    found, sums, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        ragged.query_ends,
        ragged.key_begins,
        max(LEAST_ROWS, ragged.most_rows),
        ragged.most_keys,
        0.0,
        ragged.has_mask and window < 0,
        return_debug_mask=False,
        scale=scale,
        window_size_left=window if ragged.has_mask else -1,
        window_size_right=0 if ragged.has_mask else -1,
        seqused_k=ragged.lengths,
    )
    return found, sums.transpose(0, 1)


def efficient(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ragged: Ragged, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the kernel of xFormers."""
    group = queries.shape[1] // keys.shape[1]
    by_group = queries.unflatten(1, (keys.shape[1], group))  # (rows, KV heads, group, width)
    parts = [
        torch.ops.aten._efficient_attention_forward(
            by_group[None, :, :, member],
            keys[None],
            values[None],
            None,
            ragged.query_ends,
            ragged.key_begins,
            ragged.most_rows,
            ragged.most_keys,
            0.0,
            CAUSAL_FROM_THE_END if ragged.has_mask else 0,
            False,
            scale=scale,
            seqlen_k=ragged.lengths,
            window_size=ragged.window if ragged.has_mask else None,
        )[0][0]
        for member in range(group)
    ]
    return (parts[0] if group == 1 else torch.stack(parts, dim=2).flatten(1, 2)), None


KERNELS: dict[str, Kernel] = {"flash": flash, "efficient": efficient}
_HALF = frozenset({torch.float16, torch.bfloat16})
_POOL, _COUNTS, _BEGINS, _LENGTHS = 384, (3, 1, 70), (200, 11, 137), (20, 310, 230)  # of a probe
_SCALE = 0.1  # of its scores
_agrees: dict[tuple[str, torch.device, torch.dtype, int, int, int, int], bool] = {}


def choose(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, needs_sums: bool) -> Kernel | None:
    """The fastest kernel for tensors like these; ``None``: there is none."""
    for name, kernel in KERNELS.items():
        if not can_run(name, queries.device) or (name == "efficient" and needs_sums):
            continue
        if name == "flash" and queries.dtype not in _HALF:
            continue
        shape = queries.shape[1], keys.shape[1], keys.shape[2], values.shape[2]
        kind = (name, queries.device, queries.dtype, *shape)
        if kind not in _agrees:
            _agrees[kind] = _try(kernel, name, queries.device, queries.dtype, *shape)
        if _agrees[kind]:
            return kernel
    return None


def _try(
    kernel: Kernel, name: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, wide: int, out: int
) -> bool:
    """Whether *kernel* runs, gives what the formula gives, and gives a query the same bits beside others. Rows and keys
    are more than a kernel has in hand at once, so that it skips some where there is a window.

    Raises:
        torch.OutOfMemoryError: another time there may be enough.
    """
    source = torch.Generator().manual_seed(0)
    shapes = (sum(_COUNTS), heads, wide), (_POOL, kv_heads, wide), (_POOL, kv_heads, out)
    tensors = [torch.randn(shape, generator=source).to(dtype) for shape in shapes]
    try:
        for has_mask, window in ((False, None), (True, None), (True, 8)):
            problem = _problem(kernel, tensors, device, window, has_mask=has_mask)
            if problem:
                raise ValueError(problem)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        logger.info("attention by %s is not used on %s in %s: %s", name, device, dtype, error)
        return False
    return True


def _problem(
    kernel: Kernel, tensors: list[torch.Tensor], device: torch.device, window: int | None, *, has_mask: bool
) -> str:
    """What is wrong with what *kernel* makes on *device* of queries, keys and values; nothing: ``""``."""
    queries, keys, values = (tensor.to(device) for tensor in tensors)

    def call(which: range) -> tuple[torch.Tensor, torch.Tensor | None]:
        ends = list(accumulate((_COUNTS[index] for index in which), initial=0))
        numbers = ends, [*(_BEGINS[index] for index in which), _POOL], [_LENGTHS[index] for index in which]
        query_ends, key_begins, lengths = (torch.tensor(some, dtype=torch.int32).to(device) for some in numbers)
        ragged = Ragged(query_ends, key_begins, lengths, max(_COUNTS), _POOL, has_mask=has_mask, window=window)
        first = sum(_COUNTS[: which.start])
        found, sums = kernel(queries[first : first + ends[-1]], keys, values, ragged, _SCALE)
        return found.cpu(), None if sums is None else sums.cpu()

    found, sums = call(range(len(_COUNTS)))
    alone = torch.cat([call(range(index, index + 1))[0] for index in range(len(_COUNTS))])
    if not torch.equal(alone, found):
        return "a query has other bits beside others"
    queries, keys, values = tensors
    places = list(zip(queries.split(_COUNTS), _BEGINS, _LENGTHS, strict=True))
    expected = [
        formula(query, keys[at : at + n], values[at : at + n], _SCALE, window, has_mask) for query, at, n in places
    ]
    scores = [_scores(query, keys[at : at + n], _SCALE, window, has_mask) for query, at, n in places]
    expected_sums = torch.cat([torch.logsumexp(some, dim=-1).T for some in scores])
    tolerance = 1e-4 if queries.dtype == torch.float32 else 2e-2
    if not torch.allclose(found.float(), torch.cat(expected), atol=tolerance, rtol=tolerance):
        return "it gives other numbers than the formula"
    if sums is not None and not torch.allclose(sums, expected_sums, atol=tolerance, rtol=tolerance):
        return "it gives other sums than the formula"
    return ""


def formula(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    has_mask: bool,
) -> torch.Tensor:
    """One query ``(rows, heads, width)`` over its keys ``(n, KV heads, width)``: ``(rows, heads, width of values)`` in
    fp32."""
    weights = torch.softmax(_scores(queries, keys, scale, window, has_mask), dim=-1)
    return torch.einsum("hrn,nhw->rhw", weights, values.float().repeat_interleave(queries.shape[1] // keys.shape[1], 1))


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, window: int | None, has_mask: bool
) -> torch.Tensor:
    """``(heads, rows, n)``."""
    wide = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = torch.einsum("rhw,nhw->hrn", queries.float(), wide) * scale
    return scores.masked_fill_(hidden(len(queries), len(keys), window), float("-inf")) if has_mask else scores


def hidden(num_rows: int, num_keys: int, window: int | None) -> torch.Tensor:
    """``(rows, keys)``: which keys the last *num_rows* of as many rows as keys do not see."""
    own = torch.arange(num_keys - num_rows, num_keys)[:, None]
    columns = torch.arange(num_keys)[None]
    future = columns > own
    return future if window is None else future | (columns <= own - window)
