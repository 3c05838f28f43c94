"""Contextual ingestion, counted: the lines of a document cost about the sweeps of one."""

from __future__ import annotations

from layerstream import LayerStream

from benchmarks.ingestion import compare


def test_all_lines_of_a_document_at_once() -> None:
    costs = compare(lambda: LayerStream("demo", kv_store=None, progress=False, chunk_tokens=32), 4, 6)
    alone, one_by_one, at_once = (costs[name] for name in ("alone", "one by one", "at once"))
    assert alone.lines == one_by_one.lines == at_once.lines
    assert at_once.sweeps < one_by_one.sweeps <= alone.sweeps
    assert at_once.computed_tokens <= one_by_one.computed_tokens + 32 < alone.computed_tokens
