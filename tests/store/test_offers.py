"""What may be loaded, of what was found: exact numbers."""

from __future__ import annotations

import pytest
from layerstream.store.offers import Found, Offer, Snapshot, Wanted
from layerstream.store.tiers.base import PageFacts

from tests.store.pages import chain

KEYS = chain(*range(8))
PAGES = [PageFacts(key, 10 + number, 1.0 + number) for number, key in enumerate(KEYS)]


def snapshots(*boundaries: int) -> list[Snapshot]:
    return [Snapshot(boundary, PageFacts(b"s%d" % boundary, 1000, 100.0 * boundary)) for boundary in boundaries]


@pytest.mark.parametrize(
    ("start", "resumable", "num_pages", "boundaries", "expected"),
    [
        (0, None, 3, (), Offer(3, 3, 0, 10 + 11 + 12, 1.0 + 2 + 3)),
        (0, None, 0, (), None),
        (0, 0, 5, (), None),
        (0, 0, 5, (2, 4), Offer(4, 4, 4, 1000 + 10 + 11 + 12 + 13, 1.0 + 2 + 3 + 4)),
        (3, 1, 4, (2, 4), Offer(1, 3, 4, 1000 + 13, 2.0 + 3 + 4)),
        (5, 2, 2, (4,), Offer(0, 2, 4, 1000, 3.0 + 4)),
        (8, 6, 2, (8,), Offer(0, 2, 8, 1000, 7.0 + 8)),
        (2, 2, 3, (6,), None),
    ],
    ids=["pages", "nothing", "no snapshot", "the last", "some in memory", "all in memory", "whole", "pages lost"],
)
def test_offers(
    start: int, resumable: int | None, num_pages: int, boundaries: tuple[int, ...], expected: Offer | None
) -> None:
    wanted = Wanted(KEYS, start, resumable)
    found = Found(PAGES[wanted.first : wanted.first + num_pages], snapshots(*boundaries))
    assert wanted.offer(found) == expected


def test_pages_without_bytes_are_there_and_cost_what_their_snapshots_did() -> None:
    wanted = Wanted(KEYS, 3, 1, has_pages=False)
    assert wanted.offer(Found((), snapshots(2, 6))) == Offer(3, 5, 6, 1000, 200.0 + 600)


def test_what_was_lost_ends_the_pages_and_is_left_out_of_the_snapshots() -> None:
    found = Found(PAGES, snapshots(2, 4, 6))
    assert found.without(lambda key: key == KEYS[5]) == Found(PAGES[:5], snapshots(2, 4, 6))
    assert found.without(lambda key: key == b"s6") == Found(PAGES, snapshots(2, 4))
