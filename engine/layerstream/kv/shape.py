"""What a layer keeps for a token: the shape of its pages, in memory and in files. Pure."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
