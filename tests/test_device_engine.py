"""The engine on a pretended device: stored KV, running out of memory, a device that is lost, bad input."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layerstream import ConfigurationError, LayerStream, SamplingParams
from layerstream.errors import BudgetTooSmall, DeviceLost, OutOfMemory
from layerstream.hardware.arena import Arena
from layerstream.hardware.reader import DirectReader
from layerstream.planner import facts as assumed
from layerstream.setup import groundwork
from layerstream.setup.draft import draft_config

from tests.harness import add_tokenizer, device_config, devices_config, draw_prompt, shrink_units
from tests.models import make_model
from tests.pretend import PretendCuda, pretend_cuda, pretend_cudas

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    shrink_units(monkeypatch)
    with pretend_cuda(monkeypatch) as device:
        yield device


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model", tokenizer_folder)
    return tmp_path / "model"


def open_engine(folder: Path, mode: str, **options) -> LayerStream:
    config = device_config(folder, mode)
    return LayerStream(
        folder,
        device="cuda",
        memory=config.memory_bytes,
        host_memory=config.host_memory_bytes,
        **{"dtype": "float32", "kv_store": None, **options},
    )


@pytest.mark.parametrize("mode", ["resident", "host", "disk"])
def test_stored_context_gives_the_same_answer_in_another_process(
    mode: str, folder: Path, tmp_path: Path, device: PretendCuda
) -> None:
    prompt = draw_prompt(200)
    with open_engine(folder, mode, kv_store=tmp_path / "kv") as engine:
        first = engine.generate([prompt], GREEDY)[0]
    with open_engine(folder, mode, kv_store=tmp_path / "kv") as engine:
        second = engine.generate([prompt], GREEDY)[0]
        again = engine.generate([prompt], GREEDY)[0]
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == again.usage.cached_tokens >= 160
    assert first.token_ids == second.token_ids == again.token_ids
    assert not device.pinned


def test_a_damaged_page_is_computed_again(folder: Path, tmp_path: Path, device: PretendCuda) -> None:
    prompt = draw_prompt(200)
    with open_engine(folder, "host", kv_store=tmp_path / "kv") as engine:
        first = engine.generate([prompt], GREEDY)[0]
    for segment in (tmp_path / "kv").rglob("*.seg*"):
        data = bytearray(segment.read_bytes())
        data[4096 + 100] ^= 0xFF
        segment.write_bytes(data)
    with open_engine(folder, "host", kv_store=tmp_path / "kv") as engine:
        second = engine.generate([prompt], GREEDY)[0]
    assert first.token_ids == second.token_ids


def test_out_of_memory_makes_sweeps_smaller_and_the_answers_are_the_same(
    folder: Path, device: PretendCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assumed, "DEVICE_SWEEP_TOKENS", 768)
    prompts = [draw_prompt(90 + length) for length in range(6)]
    with open_engine(folder, "resident") as engine:
        expected = [completion.token_ids for completion in engine.generate(prompts, GREEDY)]
    with caplog.at_level(logging.WARNING, logger="layerstream"), open_engine(folder, "resident") as engine:
        runner = engine._parts.step._runner
        decode = runner._decode

        def with_little_memory(**inputs: torch.Tensor):
            rows = inputs["position_ids"].shape[1]
            if rows > 200:
                raise torch.OutOfMemoryError(f"pretended: {rows} rows")
            return decode(**inputs)

        runner._decode = with_little_memory
        found = [completion.token_ids for completion in engine.generate(prompts, GREEDY)]
        limits = engine._parts.scheduler.limits
    assert found == expected
    assert limits.max_tokens < 200
    assert f"at most {limits.max_tokens} tokens of prompts" in caplog.text


def test_out_of_memory_in_the_smallest_sweep_fails_its_requests_and_no_others(
    folder: Path, device: PretendCuda
) -> None:
    with open_engine(folder, "host") as engine:
        device.ceiling, device.is_strict = device.live_bytes + 1000, True
        with pytest.raises(OutOfMemory, match="the smallest sweep there is"):
            engine.generate([draw_prompt(50)], GREEDY)
        device.ceiling = 2**30
        assert len(engine.generate([draw_prompt(50)], GREEDY)[0].token_ids) == 12


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("mode", ["host", "disk"])
def test_a_lost_device_fails_the_requests_and_not_the_process(
    mode: str, folder: Path, device: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(folder, mode)
    engine.generate([draw_prompt(20)], GREEDY)
    running = engine.submit(draw_prompt(30), replace(GREEDY, max_tokens=500))
    next(iter(running))

    def lose(*_: object) -> None:
        raise RuntimeError("pretended: device lost")

    monkeypatch.setattr(device.inward, "copy", lose)
    with pytest.raises(DeviceLost, match="will not compute again in this process"):
        running.result(timeout=60)
    with pytest.raises(DeviceLost):
        engine.generate([draw_prompt(20)], GREEDY)
    engine.close()
    assert not device.pinned


def test_more_pinned_memory_than_the_system_allows(folder: Path, device: PretendCuda) -> None:
    device._pinned_bytes = 2**16
    with pytest.raises(ConfigurationError, match="smaller host_memory"):
        open_engine(folder, "host")
    assert not device.pinned


def test_budgets_below_the_minimum_name_it(folder: Path, device: PretendCuda) -> None:
    with pytest.raises(BudgetTooSmall) as error:
        LayerStream(folder, device="cuda", memory=1000, host_memory="1GiB", dtype="float32", kv_store=None)
    enough = error.value.required_bytes
    LayerStream(folder, device="cuda", memory=enough, host_memory="1GiB", dtype="float32", kv_store=None).close()
    with pytest.raises(BudgetTooSmall, match="host_memory=") as error:
        LayerStream(folder, device="cuda", memory=enough, host_memory=1000, dtype="float32", kv_store=None)
    enough_host = error.value.required_bytes
    options = {"dtype": "float32", "kv_store": None}
    LayerStream(folder, device="cuda", memory=enough, host_memory=enough_host, **options).close()


def test_more_host_memory_than_there_is(folder: Path, device: PretendCuda) -> None:
    with pytest.raises(ConfigurationError, match="host memory are free"):
        LayerStream(folder, device="cuda", memory="1GiB", host_memory="900TiB", kv_store=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without CUDA")
def test_cuda_without_a_matching_torch(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="built without CUDA: install a build for your driver"):
        LayerStream(folder, device="cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:-1"])
def test_names_of_devices(name: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected 'auto', 'cpu', 'cuda'"):
        LayerStream(folder, device=name)


def test_host_memory_is_for_accelerators(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="the memory behind an accelerator"):
        LayerStream(folder, device="cpu", host_memory="1GiB")


def test_a_draft_model_shares_the_ceiling(folder: Path, tmp_path: Path, device: PretendCuda) -> None:
    config = device_config(folder, "resident")
    assert config.memory_bytes is not None
    memory = 3 * config.memory_bytes
    options = {"dtype": "float32", "kv_store": None, "host_memory": "1GiB"}
    with LayerStream(folder, device="cuda", memory=memory, **options) as engine:
        expected = engine.generate([draw_prompt(40)], GREEDY)[0]
    with LayerStream(folder, device="cuda", memory=memory, draft_model=str(folder), **options) as engine:
        found = engine.generate([draw_prompt(40)], GREEDY)[0]
        assert engine.stats().drafters["model"].accepted > 0
    assert found.token_ids == expected.token_ids
    assert found.metrics.sweeps < expected.metrics.sweeps
    assert device.most_bytes <= memory
    assert not device.pinned


def test_a_draft_model_has_graphs_where_they_are_wanted(folder: Path, device: PretendCuda) -> None:
    config = replace(device_config(folder, "resident"), memory_bytes=2**30, draft_model=str(folder))
    for is_wanted in (True, False):
        assert draft_config(replace(config, cuda_graphs=is_wanted)).cuda_graphs == is_wanted


@pytest.mark.parametrize("mode", ["host", "disk"])
def test_slow_disks_and_network_folders_are_said_where_sweeps_wait_for_them(
    mode: str, folder: Path, device: PretendCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(groundwork, "network_file_system", lambda path: "nfs4")
    monkeypatch.setattr(DirectReader, "rate", lambda self: 30e6)
    with caplog.at_level(logging.WARNING, logger="layerstream"), open_engine(folder, mode):
        pass
    assert ("the disk brings 30 MB/s" in caplog.text) == (mode == "disk")
    assert ("network folder (nfs4)" in caplog.text) == (mode == "disk")


def test_an_arena_is_pinned_once(device: PretendCuda) -> None:
    arena = Arena(4096)
    device.pin(arena)
    device.unpin(arena)
    assert not device.pinned


def test_layers_on_several_devices(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses, stored KV and a device that is lost: everything that knows of devices knows of several."""
    shrink_units(monkeypatch)
    prompt = draw_prompt(200)
    with LayerStream(folder, device="cpu", dtype="float32", kv_store=None) as engine:
        expected = engine.generate([prompt], GREEDY)[0].token_ids
    with pretend_cudas(monkeypatch, 2) as devices:
        memory = list(devices_config(folder, "host", "auto", 2).memory_each)
        options = {"device_map": "auto", "memory": memory, "host_memory": "1GiB", "dtype": "float32"}
        for cached in (False, True):
            with LayerStream(folder, kv_store=tmp_path / "kv", **options) as engine:
                found = engine.generate([prompt], GREEDY)[0]
                assert found.token_ids == expected
                assert (found.usage.cached_tokens >= 160) == cached
                assert engine.stats().peak_memory_bytes > 0
        engine = LayerStream(folder, kv_store=None, **options)

        def lose(*_: object) -> None:
            raise RuntimeError("pretended: device lost")

        plan = engine.plan
        streams = next(number for number, part in zip(plan.devices, plan.parts, strict=True) if part.streams)
        monkeypatch.setattr(devices[streams].inward, "copy", lose)
        with pytest.raises(DeviceLost):
            engine.generate([prompt], GREEDY)
        engine.close()
        assert not any(device.pinned for device in devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "both"}, "'auto', 'balanced', 'sequential'"),
        ({"device_map": "auto", "device": "cpu"}, "CUDA_VISIBLE_DEVICES"),
        ({"memory": ["1GiB", "2GiB"]}, "a ceiling for each device"),
        ({"device": "mps", "memory": "1GiB"}, "no Apple device here"),
    ],
)
def test_devices_that_cannot_be_meant(options: dict, message: str, folder: Path) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine is a Mac")
    with pytest.raises(ConfigurationError, match=message):
        LayerStream(folder, **options)
