"""Whom a multi-token-prediction head follows, in which pages; and whether its guesses pay."""

from __future__ import annotations

from dataclasses import replace

from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.kv.pages import PagePool
from layerstream.scheduling.drafting.following import cut, find_computed, pack
from layerstream.scheduling.drafting.mirrors import Mirrors
from layerstream.scheduling.drafting.pace import FIRST_ROUNDS, PROBE_EVERY, Pace
from layerstream.scheduling.packing import SweepLimits

SIZE = 4


def make(num_pages: int = 8) -> tuple[Mirrors, PagePool]:
    pool = PagePool(num_pages, SIZE)
    return Mirrors(pool), pool


def sequence(*token_ids: int) -> Sequence:
    return Sequence(0, list(token_ids), len(token_ids), SamplingParams(max_tokens=8))


def test_a_row_goes_with_the_token_that_follows() -> None:
    mirrors, pool = make()
    asked = sequence(10, 11, 12, 13, 14, 15)
    span = mirrors.follow(asked, 0, 4)  # a chunk of its prompt
    assert span is not None
    assert (span.start, span.stop, span.sequence.token_ids) == (0, 4, [11, 12, 13, 14])
    assert mirrors.of(asked) is None, "its newest token has no row yet"
    span = mirrors.follow(asked, 4, 6)
    assert span is not None
    assert (span.start, span.stop) == (4, 5), "what follows its last token is not known"
    assert mirrors.of(asked) is not None
    asked.token_ids.append(16)
    assert mirrors.of(asked) is None
    span = mirrors.follow(asked, 5, 6)
    assert span is not None
    assert (span.start, span.stop, span.sequence.token_ids[5:]) == (5, 6, [16])
    assert pool.num_used == 2
    mirrors.check_integrity()


def test_it_begins_behind_a_prefix_that_it_did_not_see() -> None:
    mirrors, _ = make()
    asked = sequence(*range(20))
    span = mirrors.follow(asked, 12, 20)
    assert span is not None
    assert (span.start, span.stop, span.sequence.token_ids) == (0, 7, [13, 14, 15, 16, 17, 18, 19])
    mirror = mirrors.of(asked)
    assert mirror is not None
    assert mirror.first == 12


def test_what_is_computed_again_is_written_again() -> None:
    mirrors, pool = make()
    asked = sequence(*range(10))
    mirrors.follow(asked, 0, 10)
    asked.token_ids[6:] = [60, 70]
    span = mirrors.follow(asked, 5, 8)
    assert span is not None
    assert (span.start, span.stop, span.sequence.token_ids) == (5, 7, [1, 2, 3, 4, 5, 60, 70])
    asked.token_ids += range(80, 88)
    span = mirrors.follow(asked, 12, 16)  # rows were missed
    assert span is not None
    assert (span.start, span.stop, pool.num_used) == (0, 3, 1)
    mirrors.check_integrity()


def test_guesses_are_taken_back() -> None:
    mirrors, pool = make(2)
    asked = sequence(*range(SIZE + 1))
    mirrors.follow(asked, 0, SIZE + 1)
    mirror = mirrors.of(asked)
    assert mirror is not None
    for guess in range(SIZE):
        span = mirrors.guess(mirror, 100 + guess)
        assert span is not None
        assert (span.start, span.stop) == (SIZE + guess, SIZE + guess + 1)
    assert mirrors.guess(mirror, 200) is None, "there is no page for it"
    mirrors.take_back()
    assert mirror.rows.token_ids == [1, 2, 3, 4]
    mirrors.forget(asked)
    assert pool.num_used == 0


def test_without_a_page_it_begins_anew() -> None:
    mirrors, pool = make(2)
    first, second = sequence(*range(7)), sequence(*range(12))
    assert mirrors.follow(first, 0, 7) is not None
    assert mirrors.follow(second, 0, 8) is None
    assert pool.num_used == 2
    mirrors.forget(first)
    span = mirrors.follow(second, 8, 12)
    assert span is not None
    assert span.sequence.token_ids == [9, 10, 11]
    mirrors.check_integrity()


def test_nodes_along_tokens() -> None:
    tree = DraftTree((5, 6, 7, 8), (ROOT, 0, 0, ROOT), ("mtp",) * 4)
    assert tree.along([5, 7, 9]) == [0, 2]
    assert tree.along([8, 5]) == [3]
    assert tree.along([9]) == tree.along([]) == []


def test_guesses_go_on_as_long_as_they_pay() -> None:
    pace = Pace()
    for _ in range(FIRST_ROUNDS):
        assert pace.begins()
        pace.swept(1.0)
        pace.guessed(4, 0.2)
        pace.gained(2, 2)
    assert pace.cost == 0.05
    assert all(pace.begins() for _ in range(100)), "a fifth of a sweep for a token more each"


def test_guesses_that_do_not_pay_are_tried_now_and_then() -> None:
    pace = Pace()
    for _ in range(FIRST_ROUNDS):
        pace.swept(1.0)
        pace.guessed(4, 0.2)
        pace.gained(0, 2)
    rounds = [pace.begins() for _ in range(2 * PROBE_EVERY)]
    assert rounds.count(True) == 2
    assert rounds[PROBE_EVERY - 1]
    for _ in range(PROBE_EVERY):  # the text has become easier
        pace.gained(4, 2)
    assert pace.begins()


def test_what_a_sweep_computed_ends_with_guesses_that_were_right() -> None:
    prompted, answered = sequence(*range(6)), sequence(*range(6))
    answered.token_ids += [40, 41, 43]  # 41 was guessed, and so was 42
    answered.tenancy.num_computed = 8
    tree = DraftTree((41, 42, 50), (ROOT, 0, ROOT), ("mtp", "context", "mtp"))
    blocks = (
        RowBlock((Span(prompted, 2, 5),), 4),
        RowBlock((Span(answered, 6, 7), *(Span(answered, at, at + 1, node) for node, at in enumerate((7, 8, 7)))), 4),
    )
    found = find_computed(Sweep(blocks, (answered,), drafts={answered: tree}))
    assert (found[prompted].start, found[prompted].rows, found[prompted].sources) == (2, [0, 1, 2], [])
    assert (found[answered].start, found[answered].rows, found[answered].sources) == (6, [4, 5], ["mtp"])


LIMITS = SweepLimits(max_tokens=8, chunk_tokens=4, decode_rows=2, prompt_rows=4, max_sequences=3)


def test_rows_are_cut_into_sweeps() -> None:
    long, short = sequence(*range(20)), sequence(*range(9))
    found = [[(span.start, span.stop) for span in part] for part in cut([Span(long, 2, 15), Span(short, 8, 9)], LIMITS)]
    assert found == [[(2, 4), (4, 8), (8, 10)], [(10, 12), (12, 15), (8, 9)]]
    alone = replace(LIMITS, one_sequence_per_block=True, max_sequences=9)
    each = [Span(sequence(*range(9)), 8, 9) for _ in range(5)]
    assert [len(part) for part in cut(each, alone)] == [4, 1], "each has a row block of its own"
    assert list(cut([], LIMITS)) == []


def test_short_spans_share_row_blocks() -> None:
    one, two, three = (Span(sequence(*range(9)), 8 - count, 8) for count in (1, 2, 1))
    chunk = Span(sequence(*range(9)), 0, 4)
    shared = pack([one, chunk, three, two], LIMITS)
    assert [(block.spans, block.num_rows) for block in shared] == [((chunk,), 4), ((one, three), 2), ((two,), 2)]
    alone = pack([one, chunk, three, two], replace(LIMITS, one_sequence_per_block=True))
    assert [block.spans for block in alone] == [(chunk,), (one,), (three,), (two,)]
