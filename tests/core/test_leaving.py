"""Rows that leave a sweep: nobody's row is lost, and blocks keep their shapes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.leaving import blocks_without
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span


def sequence(number: int) -> Sequence:
    return Sequence(number, [0] * 100, 90, SamplingParams())


@given(
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sets(st.integers(0, 40)),
)
def test_those_that_stay_keep_their_order_in_blocks_of_the_same_shape(
    blocks: list[list[int]], num_decoding: int, leaving: set[int]
) -> None:
    going, other, size = sequence(0), sequence(1), 24
    at = {going: 0, other: 0}
    made = []
    for lengths in blocks:
        spans = []
        for index, length in enumerate(lengths):
            owner = other if index % 2 else going
            spans.append(Span(owner, at[owner], at[owner] + length))
            at[owner] += length
        made.append(RowBlock(tuple(spans), size))
    decode = RowBlock(tuple(Span(other, 90 + n, 91 + n) for n in range(num_decoding)), 4)
    before = [*made, decode]
    found, rows = blocks_without(before, lambda owner, position: owner is other or position not in leaving)

    def flat(blocks: list[RowBlock]) -> list[tuple[Sequence, int, int]]:
        result, row = [], 0
        for block in blocks:
            for start, span in block.spans_from(row):
                result += [(span.sequence, span.start + n, start + n) for n in range(len(span))]
            row += block.num_rows
        return result

    expected = [(owner, token, row) for owner, token, row in flat(before) if owner is other or token not in leaving]
    assert [(owner, token, rows[row]) for owner, token, row in flat(found)] == expected
    assert len(rows) == sum(block.num_rows for block in found) <= sum(block.num_rows for block in before)
    assert {block.num_rows for block in found} <= {size, 4}
    assert found[-1] == decode


def test_blocks_that_have_no_fixed_size_stay_as_they_are_where_nothing_leaves() -> None:
    one = sequence(0)
    blocks = [RowBlock((Span(one, 0, 8),), 8), RowBlock((Span(one, 8, 11),), 3)]
    found, rows = blocks_without(blocks, lambda owner, position: True)
    assert [block.num_rows for block in found] == [8, 3]
    assert rows == list(range(11))
