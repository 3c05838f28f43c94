"""Pages are as small as pays."""

from __future__ import annotations

import pytest
from layerstream.kv.shape import PageShape
from layerstream.setup.page_size import choose_page_tokens


@pytest.mark.parametrize(
    ("heads", "width", "compression", "expected"),
    [
        (8, 128, "none", 8),  # 32 KiB a page-layer
        (2, 64, "none", 8),  # one block of the disk
        (3, 32, "none", 8),  # three quarters of one
        (1, 32, "none", 32),  # smaller ones would be mostly padding
        (8, 128, "int8", 8),
        (2, 64, "int8", 32),
    ],
)
def test_small_ones_unless_they_are_padding(heads: int, width: int, compression: str, expected: int) -> None:
    shape = PageShape(heads, width, heads, width, "bfloat16")
    assert choose_page_tokens([shape], compression, 32) == expected


def test_a_chunk_has_whole_pages_and_layers_without_kv_want_none() -> None:
    assert choose_page_tokens([], "none", 32) == 8
    assert choose_page_tokens([PageShape(1, 8, 1, 8, "bfloat16")], "none", 16) == 16
