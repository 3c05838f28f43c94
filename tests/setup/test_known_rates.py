"""What is known of a machine's rates: the best of what was seen, in a file that several write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerstream import LayerStream, SamplingParams
from layerstream.hardware.remembered import machine_name
from layerstream.measuring import rates as probe
from layerstream.planner import make_plan
from layerstream.planner.forecast import Forecast
from layerstream.planner.rates import Rates
from layerstream.setup.config import EngineConfig
from layerstream.setup.known_rates import VARIABLE, KnownRates, correct
from layerstream.setup.plan_model import plan_facts

from tests.harness import draw_prompt
from tests.planner.test_forecast import RATES
from tests.planner.test_planner import MIB, facts

CPU = torch.device("cpu")
_times = st.floats(0.1, 10.0)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "rates.json"))
    return tmp_path / "rates.json"


def slower(rates: Rates, times: float) -> Rates:
    """As they are measured when the machine is busy."""
    return dataclasses.replace(rates.sped_up(1 / times), disk=rates.disk / times, num_measured=1)


@given(first=_times, second=_times)
def test_the_best_of_two_measurements_counts_in_whatever_order(first: float, second: float) -> None:
    one, other = slower(RATES, first), slower(RATES, second)
    best = one.best_of(other)
    assert best == other.best_of(one)
    assert best == dataclasses.replace(slower(RATES, min(first, second)), num_measured=2)
    assert best.best_of(slower(RATES, 100.0)).products == best.products


def test_what_one_of_them_has_not_is_the_others() -> None:
    other = Rates(disk=1.0, products={"int4": {1: 1e-11}}, link=5e9, layer_seconds=1e-5)
    best = RATES.best_of(other)
    assert set(best.products) == {"bfloat16", "int4"}
    assert (best.disk, best.link, best.layer_seconds) == (RATES.disk, 5e9, 1e-5)
    assert best.decode == RATES.decode
    assert best.process_bytes == RATES.process_bytes


def test_a_sweep_that_was_faster_than_the_rates_allow_corrects_them(file: Path) -> None:
    plan, name = make_plan(facts(), 4096 * MIB), machine_name(CPU)
    correct(plan, "bfloat16", 1e-4)
    assert not file.exists(), "nothing is known that could be corrected"
    KnownRates().write(name, slower(RATES, 100.0), "disk 1")
    expected = Forecast(plan, RATES, "bfloat16").decode_seconds
    correct(plan, "bfloat16", 1000 * expected)
    assert KnownRates().rates(name) == slower(RATES, 100.0), "a slow sweep says nothing: others may have computed"
    correct(plan, "bfloat16", expected)
    known = KnownRates().rates(name)
    assert known is not None
    assert Forecast(plan, known, "bfloat16").sweep_seconds == pytest.approx(expected)
    assert KnownRates().disk("disk 1") == pytest.approx(1e7)


def test_an_engine_corrects_them_when_it_is_closed(file: Path, folder: Path) -> None:
    slow = slower(dataclasses.replace(RATES, products={"float32": {1: 1.0}}), 1.0)
    KnownRates().write(machine_name(CPU), slow, "disk 1")
    with LayerStream(folder, memory="256MiB", dtype="float32", kv_store=None, speculation="off") as engine:
        engine.generate([draw_prompt(9)], SamplingParams(max_tokens=4, ignore_eos=True))
    known = KnownRates().rates(machine_name(CPU))
    assert known is not None
    assert known.products["float32"][1] < 1.0


def test_two_that_write_keep_what_the_other_wrote(file: Path) -> None:
    first, second = KnownRates(), KnownRates()
    first.write("one", RATES, "disk 1")
    second.write("other", RATES, "disk 2")
    assert KnownRates().rates("one") == KnownRates().rates("other") == RATES
    assert KnownRates().disk("disk 1") == KnownRates().disk("disk 2") == RATES.disk


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"machines": 3, "disks": []}',
        '{"machines": {"one": {"products": {"float32": {}}, "cached": {}}}}',
        "[" * 100_000,
        '{"disks": ' + "9" * 5000 + "}",
    ],
)
def test_whatever_is_wrong_with_the_file_counts_as_nothing_known(file: Path, content: str) -> None:
    file.write_text(content)
    assert KnownRates().rates("one") is None
    assert KnownRates().disk("disk 1") is None
    KnownRates().write("one", RATES, "disk 1")
    assert json.loads(file.read_text())["disks"] == {"disk 1": RATES.disk}


def test_the_first_few_forecasts_measure_and_the_best_is_kept(
    file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataclasses.replace(RATES, products={"float32": {1: 1e-10}}, num_measured=1)
    seen = iter([slower(plain, 100.0), plain, slower(plain, 50.0)])
    monkeypatch.setattr(probe, "measure", lambda device, dtype: next(seen))
    disks = iter([1e8, 2e9, 5e8])
    monkeypatch.setattr(probe, "measure_disk", lambda file: next(disks))
    monkeypatch.setattr(probe, "measure_read_cost", lambda file, dtype: 0.2)
    skeleton = plan_facts(EngineConfig(str(folder), dtype="float32", memory_bytes=2**30))[1]
    found = [probe.rates_for(skeleton, CPU) for _ in range(probe.TIMES + 2)]
    assert [rates.products["float32"][1] for rates in found] == pytest.approx([1e-8, *[1e-10] * 4])
    assert [rates.disk for rates in found] == [1e8, 2e9, 2e9, 2e9, 2e9]
    assert next(seen, None) is None
