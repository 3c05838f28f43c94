"""A minute of the campaign, every kind several times; ``make faults`` runs thousands."""

from __future__ import annotations

import pytest

from tests.faults.campaign import run
from tests.faults.kinds import KINDS
from tests.faults.trials import draw
from tests.faults.world import World, make_world

SEED = 19


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(world: World, kind: str) -> None:
    kinds = list(KINDS)
    trial = draw(SEED, kinds.index(kind), kinds)
    assert trial.kind == kind
    wrong = run(trial, world).wrong
    assert not wrong, "\n".join([trial.line, *wrong])


def test_a_trial_follows_from_its_line() -> None:
    kinds = list(KINDS)
    assert draw(3, 14, kinds) == draw(3, 14, kinds)
    assert draw(3, 14, kinds) != draw(4, 14, kinds)
    assert {draw(0, index, kinds).kind for index in range(len(kinds))} == set(kinds)
