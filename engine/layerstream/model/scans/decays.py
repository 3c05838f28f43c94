"""Products of the rows of a chunk with the rows before them, faded by what decays in between. Pure.

``Σ_d aᵢ_d exp(cᵢ_d − cⱼ_d) kⱼ_d`` for *j ≤ i*, where ``c`` are the decays (logarithms, at most zero) added up from the
chunk's beginning. No exponent that is computed is above zero, so nothing overflows however fast a state decays.
"""

from __future__ import annotations

import torch

FAINT = -60.0  # what has decayed to exp(this), 1e-26, decays no further within a chunk


def fading(exponents: torch.Tensor) -> torch.Tensor:
    """What decays leave, in place of *exponents*.

    It is :data:`FAINT` at the least: exponentials that underflow were measured to cost 70 times as much as others, and
    products of denormal numbers 20 times.
    """
    return exponents.clamp_(FAINT, 0.0).exp_()


def between(reached: torch.Tensor) -> torch.Tensor:
    """How much of row *j* is left at row *i*: ``(heads, rows, rows)`` of *reached* ``(heads, rows)``, one decay per
    head; zero where *j* comes after *i*."""
    return fading(reached[:, :, None] - reached[:, None, :]).tril_()


def faded_products(rows: torch.Tensor, keys: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
    """The products of each of *rows* ``(kinds, heads, n, width)`` with *keys* ``(heads, n, width)``, with a decay per
    channel *reached* ``(heads, n, width)``: ``(kinds, heads, n, n)``, zeros where a key comes after the row.

    A chunk is cut in halves, these again, down to single rows. Of two halves, the decay from a key in the first to a
    row in the second is cut in two where the second begins: a factor of the key, and one of the row. So what is left
    is a product of matrices.
    """
    kinds, heads, count, width = rows.shape
    size = 1 << (count - 1).bit_length()
    rows, keys, reached = (_padded(tensor, size - count) for tensor in (rows, keys, reached))
    found = rows.new_zeros((kinds, heads, size, size))
    found.diagonal(dim1=-2, dim2=-1).copy_((rows * keys).sum(-1))
    half = size // 2
    while half:
        pairs = size // (2 * half)
        decays = reached.view(heads, pairs, 2, half, width)
        start = decays[:, :, 1, :1]
        early = keys.view(heads, pairs, 2, half, width)[:, :, 0] * fading(start - decays[:, :, 0])
        late = rows.view(kinds, heads, pairs, 2, half, width)[:, :, :, 1] * fading(decays[:, :, 1] - start)
        blocks = found.view(kinds, heads, pairs, 2, half, pairs, 2, half)[:, :, :, 1, :, :, 0]
        blocks.diagonal(dim1=2, dim2=4).copy_((late @ early.mT).permute(0, 1, 3, 4, 2))
        half //= 2
    return found[..., :count, :count]


def _padded(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """With *count* rows more, which neither decay nor hold anything."""
    if not count:
        return tensor
    *outer, _, width = tensor.shape
    return torch.cat((tensor, tensor.new_zeros((*outer, count, width))), -2)
