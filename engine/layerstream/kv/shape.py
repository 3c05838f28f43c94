"""What a layer keeps: for every token, the shape of its pages; for a whole sequence, the shape of its state. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

STATE_ALIGNMENT = 64  # bytes: a line of the cache
BATCH_BYTES = 16 * 2**20
"""States that a device steps at once, padding included: a step passes them about eight times, which is to take no
longer than to launch it."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class PageShape:
    """What one layer keeps for one token: keys ``(heads, width)`` and values, and their dtype's name."""

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int
    dtype: str

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys."""
        return self.key_heads * self.key_width * ITEM_BYTES[self.dtype]

    @property
    def value_bytes(self) -> int:
        """Bytes of one token's values."""
        return self.value_heads * self.value_width * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a recurrent layer's state: ``shape`` without the batch, as ``(channels, kernel)`` of a convolution
    or ``(heads, key width, value width)`` of a delta rule, and its dtype's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one recurrent layer keeps for a sequence, however long that is."""

    parts: tuple[StatePart, ...]

    @property
    def num_bytes(self) -> int:
        """Of all parts; each begins at a multiple of :data:`STATE_ALIGNMENT`."""
        return self.offsets[-1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each part begins, and where the last one ends."""
        at = [0]
        for part in self.parts:
            at.append(at[-1] + -(-part.num_bytes // STATE_ALIGNMENT) * STATE_ALIGNMENT)
        return tuple(at)

    @property
    def page(self) -> PageShape:
        """As a page of one token, in bytes: what stores and swap files keep of it."""
        return PageShape(1, self.num_bytes, 1, 0, "uint8")


def rows_at_once(state_bytes: int, block_rows: int) -> int:
    """Of a decode block of *block_rows*, each with *state_bytes* in a layer, how many a device steps at once: a power
    of two. It depends on the model and the block alone, as bits do on it."""
    most = max(1, min(block_rows, BATCH_BYTES // max(1, state_bytes)))
    return 1 << (most.bit_length() - 1)
