"""Which rows of a decode block go on at once, and from which slots."""

from __future__ import annotations

import pytest
from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, StateRoute, Sweep
from layerstream.kv.shape import BATCH_BYTES, rows_at_once
from layerstream.model.state_steps import steps_of


def sequence(number: int) -> Sequence:
    return Sequence(number, list(range(3, 13)), 5, SamplingParams())


def sweep_of(
    rows: dict[Sequence, range], drafts: dict[Sequence, DraftTree] | None = None, stops: tuple[int, ...] = ()
) -> Sweep:
    """Each sequence's known tokens *rows*, then its guesses, in one block; states go from slot ``2 n`` to ``2 n + 1``,
    and those after *stops* tokens to slots from 90 on."""
    spans: list[Span] = []
    for own, tokens in rows.items():
        spans += [Span(own, token, token + 1) for token in tokens]
        tree = (drafts or {}).get(own)
        spans += [Span(own, tokens.stop + d - 1, tokens.stop + d, n) for n, d in enumerate(tree.depths if tree else ())]
    routes = {
        own: StateRoute(
            tokens.start,
            2 * own.sequence_id,
            (*((stop, 90 + n) for n, stop in enumerate(stops)), (tokens.stop, 2 * own.sequence_id + 1)),
        )
        for own, tokens in rows.items()
    }
    return Sweep((RowBlock(tuple(spans), 16),), (), drafts=drafts or {}, routes=routes)


def found(sweep: Sweep, most: int = 16) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    return [(step.rows, step.sources, step.targets) for step in steps_of(sweep.blocks[0], sweep, most)]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_newest_tokens_are_one_step(count: int) -> None:
    sequences = [sequence(number) for number in range(count)]
    sweep = sweep_of({own: range(9, 10) for own in sequences})
    rows = tuple(range(count))
    assert found(sweep) == [(rows, tuple(2 * row for row in rows), tuple(2 * row + 1 for row in rows))]


def test_more_than_go_at_once_are_cut() -> None:
    sweep = sweep_of({sequence(number): range(9, 10) for number in range(5)})
    assert [rows for rows, _, _ in found(sweep, 2)] == [(0, 1), (2, 3), (4,)]


def test_known_rows_of_one_sequence_follow_each_other_through_its_slots() -> None:
    first, second = sequence(0), sequence(1)
    sweep = sweep_of({first: range(7, 10), second: range(9, 10)}, stops=(9,))
    assert found(sweep) == [((0, 3), (0, 2), (90, 3)), ((1,), (90,), (90,)), ((2,), (90,), (1,))]


def test_guesses_go_on_from_their_parents() -> None:
    first, second = sequence(0), sequence(1)
    tree = DraftTree((5, 6, 7), (ROOT, 0, ROOT), ("test",) * 3)
    chain = DraftTree((8, 9), (ROOT, 0), ("test",) * 2)
    sweep = sweep_of({first: range(9, 10), second: range(9, 10)}, {first: tree, second: chain})
    assert found(sweep) == [((0, 4), (0, 2), (1, 3)), ((1, 3, 5), (1, 1, 3), ()), ((2, 6), (), ())]
    last = steps_of(sweep.blocks[0], sweep, 16)[-1]
    assert [(span.sequence, span.node) for span in last.spans] == [(first, 1), (second, 1)]


def test_rows_at_once_are_a_power_of_two_that_their_states_have_room_for() -> None:
    assert rows_at_once(1, 128) == 128
    assert rows_at_once(1, 24) == 16
    assert rows_at_once(BATCH_BYTES // 9, 128) == 8
    assert rows_at_once(2 * BATCH_BYTES, 128) == 1
