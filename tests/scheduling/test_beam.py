"""Which continuations of which beams are kept: one beam at a time is looked at, and nothing is missed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from layerstream.scheduling.beam import BeamSearch

_logprobs = st.lists(
    st.lists(st.sampled_from([-0.5, -1.0, -1.5, -2.0, -7.25, float("-inf")]), min_size=12, max_size=12),
    min_size=1,
    max_size=5,
)


@given(rows=_logprobs, width=st.integers(2, 6), ends=st.sets(st.integers(0, 11), max_size=3), data=st.data())
def test_the_best_of_all_beams_are_those_of_one_sort_over_all(
    rows: list[list[float]], width: int, ends: set[int], data: st.DataObject
) -> None:
    scores = [data.draw(st.sampled_from([0.0, -0.5, -1.0, -3.0])) for _ in rows]
    search = BeamSearch(width, 100, 1.0, ends, scores=scores)
    beams = [np.array(row, dtype=np.float32) for row in rows]
    found = search._best(iter(beams))
    flat = np.concatenate([score + row for score, row in zip(scores, beams, strict=True)])
    order = np.argsort(-flat, kind="stable")[: (1 + max(1, len(ends))) * width]
    assert [(one.beam, one.token_id, one.score) for one in found] == [(at // 12, at % 12, flat[at]) for at in order]
