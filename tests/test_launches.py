"""What a decode sweep asks of a device does not grow with the sequences in it, and is little: counted in operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import launches
from tests.counting import Counts
from tests.pretend import PretendCuda

LAUNCHES = 24
"""A layer of a resident dense model, in bf16, is given at most so many."""

MATRIX_LAUNCHES = 3
"""A quantised matrix takes at most so many more."""

NUMBERS = (1, 8, 128)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[int, Path]]:
    """By model and format, those with different numbers of layers."""
    kinds = [("dense", form) for form in launches.FORMATS] + [("mixture", "bf16")]
    work = tmp_path_factory.mktemp("launches")
    return {kind: launches.write(*kind, work / "-".join(kind)) for kind in kinds}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with launches.pretended(monkeypatch) as device:
        yield device


def num_launches(counts: Counts) -> float:
    return counts.totals()["launches"]


@pytest.mark.parametrize("place", launches.PLACES)
def test_a_dense_layer_takes_the_same_for_any_number(place: str, checkpoints: dict, device: PretendCuda) -> None:
    folders = checkpoints["dense", "bf16"]
    asked = {number: launches.measure(folders, place, number, device) for number in NUMBERS}
    assert len({num_launches(counts.layer) for counts in asked.values()}) == 1, _told(asked)
    assert len({counts.layer.totals()["copies"] for counts in asked.values()}) == 1, _told(asked)
    if place == "resident":
        assert num_launches(asked[1].layer) <= LAUNCHES, _told(asked)


def test_a_mixture_s_layer_takes_the_same_for_any_number(checkpoints: dict, device: PretendCuda) -> None:
    folders = checkpoints["mixture", "bf16"]
    asked = {number: launches.measure(folders, "resident", number, device) for number in (1, 32)}
    assert len({num_launches(counts.layer) for counts in asked.values()}) == 1, _told(asked)


@pytest.mark.parametrize("place", launches.PLACES)
@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_a_quantised_matrix_takes_few_more(form: str, place: str, checkpoints: dict, device: PretendCuda) -> None:
    plain = launches.measure(checkpoints["dense", "bf16"], place, 8, device)
    quantised = launches.measure(checkpoints["dense", form], place, 8, device)
    more = num_launches(quantised.layer) - num_launches(plain.layer)
    told = _told({8: plain}) + _told({8: quantised})
    assert more <= MATRIX_LAUNCHES * launches.MATRICES["dense"], told


def _told(asked: dict[int, launches.Asked]) -> str:
    return "\n".join(f"{number}: {counts.layer.totals()} {counts.layer.launches}" for number, counts in asked.items())
