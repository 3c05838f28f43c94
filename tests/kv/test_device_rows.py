"""Where rows are written and what they read, acted out on a pool of labels."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sight import Sight
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.kv import device_rows
from layerstream.kv.device_rows import Reading, rows_of, staged_rows
from layerstream.kv.state import merged, runs

PAGE = 4
NUM_PAGES = 60
SIGHTS = (Sight(), Sight(window=5), Sight(chunk=8), Sight(window=3, chunk=8))


def draw_sweep(seed: int) -> Sweep:
    """Some prompts and some decoding sequences with trees of guesses, on pages that are neighbours now and then."""
    source = random.Random(seed)
    pages = list(range(NUM_PAGES))
    if source.random() < 0.7:
        source.shuffle(pages)
    spans: list[Span] = []
    prompts: list[Span] = []
    drafts: dict[Sequence, DraftTree] = {}
    for number in range(source.randint(1, 4)):
        num_tokens = source.randint(1, 20)
        is_prompt = source.random() < 0.4
        sequence = Sequence(number, [1] * num_tokens, num_tokens if is_prompt else 1, SamplingParams())
        sequence.tenancy.pages = [pages.pop() for _ in range(8)]
        if source.random() < 0.5:
            sequence.tenancy.pages.sort()
        if is_prompt:
            prompts.append(Span(sequence, source.randint(0, num_tokens - 1), num_tokens))
            continue
        newest = num_tokens - 1
        spans.append(Span(sequence, newest, num_tokens))
        parents: list[int] = []
        for node in range(source.choice((0, 0, 1, 4, 7))):
            branch = [ROOT, *range(node)] if source.random() < 0.5 else [node - 1]
            parents.append(source.choice(branch))
        if parents:
            tree = drafts[sequence] = DraftTree(tuple(range(len(parents))), tuple(parents), ("",) * len(parents))
            spans.extend(
                Span(sequence, newest + depth, newest + depth + 1, node) for node, depth in enumerate(tree.depths)
            )
    size = source.choice((3, 8))
    blocks = [RowBlock((span,), len(span)) for span in prompts]
    blocks += [RowBlock(tuple(spans[at : at + size]), size) for at in range(0, len(spans), size)]
    return Sweep(tuple(blocks), (), drafts=drafts)


def keys_of(reading: Reading, index: int) -> list[int]:
    """The pool's rows that a query's keys are."""
    query = reading.queries[index]
    rows = [row for first, count in query.keys for row in range(first, first + count)]
    return rows or list(range(query.begin, query.begin + query.length))


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_every_row_sees_its_own_past_and_nothing_else(seed: int) -> None:
    sweep = draw_sweep(seed)
    rows = rows_of(sweep, PAGE, NUM_PAGES)
    pool: dict[int, object] = {}
    for _, span in sweep.spans():  # what earlier sweeps left
        for position in range(span.sequence.num_tokens):
            pool[device_rows.pool_row(span.sequence, position, PAGE)] = (span.sequence.sequence_id, position, ROOT)
    for _ in range(2):  # a later layer may attend to the same keys
        for number, (block, own) in enumerate(zip(sweep.blocks, rows.blocks, strict=True)):
            labels = [
                (span.sequence.sequence_id, position, span.node)
                for span in block.spans
                for position in range(span.start, span.stop)
            ] + [None] * block.num_padding
            for target, label in zip(own.targets, labels, strict=True):
                pool[target] = label
            for sight in SIGHTS:
                attended: list[int] = []
                for turn, wave in enumerate(own.waves):
                    for other, row, target in wave.moves:
                        span = next(span for at, span in sweep.blocks[other].spans_from(0) if at == row)
                        pool[target] = (span.sequence.sequence_id, span.start, span.node)
                    for reading in rows.readings(number, turn, sight):
                        attended += check_reading(reading, sweep, block, sight, pool, rows.spare)
                assert sorted(row for row in attended if row < block.num_used) == list(range(block.num_used))
    for sequence, path in rows.placed.items():
        for depth, node in enumerate(path):
            row = device_rows.pool_row(sequence, sequence.num_tokens + depth, PAGE)
            assert pool[row] == (sequence.sequence_id, sequence.num_tokens + depth, node)


def check_reading(
    reading: Reading, sweep: Sweep, block: RowBlock, sight: Sight, pool: dict[int, object], spare: int
) -> list[int]:
    """The rows of the block that attend in *reading*, each of which sees what it should."""
    spans = dict(zip_rows(block))
    attended = []
    if reading.is_whole:
        assert reading.rows == list(range(block.num_rows))
    for index, query in enumerate(reading.queries):
        keys = keys_of(reading, index)
        assert len(keys) == query.length
        assert not reading.is_alone or query.count == 1
        for place in range(query.count):
            row = query.row + place
            attended.append(row)
            if row >= block.num_used:
                assert keys == [spare]
                continue
            span, position = spans[row]
            assert query.count <= len(span)
            seen = keys[: query.length - (query.count - 1 - place)]
            if sight.window is not None:
                seen = seen[-sight.window :]
            path = sweep.drafts[span.sequence].paths[span.node] if span.is_drafted else ()
            root = span.sequence.num_tokens - 1
            expected = [
                (span.sequence.sequence_id, at, path[at - root - 1] if path and at > root else ROOT)
                for at in range(sight.first(position), position + 1)
            ]
            assert [pool[key] for key in seen] == expected
    return attended


def zip_rows(block: RowBlock) -> list[tuple[int, tuple[Span, int]]]:
    """Each used row of *block* with its span and position."""
    pairs = [(span, position) for span in block.spans for position in range(span.start, span.stop)]
    return list(enumerate(pairs))


def test_rows_that_stand_alone_are_one_call_of_the_block_s_shape() -> None:
    sequences = [Sequence(n, [1] * (3 + n), 1, SamplingParams()) for n in range(3)]
    for number, sequence in enumerate(sequences):
        sequence.tenancy.pages = [2 * number, 2 * number + 1]
    block = RowBlock(tuple(Span(s, s.num_tokens - 1, s.num_tokens) for s in sequences), 8)
    (reading,) = rows_of(Sweep((block,), ()), PAGE, NUM_PAGES).readings(0, 0, Sight())
    assert (reading.is_whole, len(reading.queries)) == (True, 8)


def test_keys_are_gathered_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_rows, "GATHERED_ROWS", 20)
    sequences = [Sequence(n, [1] * 8, 1, SamplingParams()) for n in range(5)]
    for number, sequence in enumerate(sequences):
        sequence.tenancy.pages = [9 - number, number]
    block = RowBlock(tuple(Span(s, 7, 8) for s in sequences), 8)
    readings = rows_of(Sweep((block,), ()), PAGE, NUM_PAGES).readings(0, 0, Sight())
    assert [(len(reading.queries), reading.is_gathered) for reading in readings] == [(2, True), (2, True), (1, True)]


def test_gaps_are_copied_where_that_takes_fewer_copies() -> None:
    pages = [0, 1, 4, 5, 20]
    assert list(merged(runs(pages, -1), 2)) == [(0, 6), (20, 1)]
    assert list(merged(runs(pages, -1), 1)) == [(0, 2), (4, 2), (20, 1)]
    assert list(merged([], 3)) == []


@pytest.mark.parametrize(("block", "most", "expected"), [(32, 40, 64), (128, 300, 256), (512, 30, 512), (8, 3, 8)])
def test_room_to_leave_side_by_side(block: int, most: int, expected: int) -> None:
    assert staged_rows(block, most) == expected
