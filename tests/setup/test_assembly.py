"""Putting an engine together, with each step failing in turn."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
from layerstream.hardware.arena import Arena
from layerstream.setup import assembly, groundwork, parts
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.store.config import KVStoreConfig

from tests.harness import device_config, shrink_units
from tests.pretend import PretendCuda, pretend_cuda

STEPS = [
    (groundwork, "plan_model"),
    (groundwork, "open_device"),
    (groundwork, "load_tokenizer"),
    (parts, "LayerState"),
    (parts, "open_store"),
    (parts, "PageSwap"),
    (parts, "ModelWeights"),
    (parts, "Scheduler"),
    (parts, "DeviceKV"),
    (parts, "EmbeddingRows"),
    (parts, "SweepRunner"),
    (parts, "SweepStep"),
    (parts, "look_at_source"),
    (assembly, "load_defaults"),
]


class Broken(Exception):
    pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch):
    shrink_units(monkeypatch)
    with pretend_cuda(monkeypatch) as device:
        yield device


@pytest.fixture
def config(folder: Path, cuda: PretendCuda, tmp_path: Path) -> EngineConfig:
    """A device whose weights come from disk and from the host, and a store."""
    return device_config(folder, "disk", kv_store=KVStoreConfig(tmp_path / "kv", max_bytes="1GiB", min_free_bytes=0))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("layerstream")}


def files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return {path for path in found if "model" in path or "kv" in path}


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_step_that_fails_leaves_nothing_behind(
    config: EngineConfig, cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch, module: object, step: str
) -> None:
    arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
    make = Arena.__init__

    def noted(arena: Arena, num_bytes: int) -> None:
        make(arena, num_bytes)
        arenas.add(arena)

    monkeypatch.setattr(Arena, "__init__", noted)

    def broken(*args: object, **options: object) -> None:
        raise Broken(step)

    monkeypatch.setattr(module, step, broken)
    before = threads(), files()
    gc.freeze()  # so that it need not look at all that was there before
    with pytest.raises(Broken):
        assemble(config, None)
    until = time.monotonic() + 10
    while threads() != before[0] and time.monotonic() < until:
        time.sleep(0.001)
    gc.collect()
    gc.unfreeze()
    assert (threads(), files()) == before
    assert not cuda.pinned
    assert not arenas


def test_nothing_fails_and_all_of_it_is_let_go_of(config: EngineConfig, cuda: PretendCuda) -> None:
    before = threads(), files()
    parts = assemble(config, None)
    assert parts.plan.weights.host_residents
    assert parts.plan.disk_bytes
    assert cuda.pinned
    parts.close()
    parts.close()
    assert (threads(), files()) == before
    assert not cuda.pinned


@pytest.mark.parametrize("step", ["check_same_tokens", "ModelDrafter"])
def test_a_draft_model_is_closed_with_what_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def broken(*args: object) -> None:
        raise Broken(step)

    monkeypatch.setattr(assembly, step, broken)
    before = threads(), files()
    with pytest.raises(Broken):
        assemble(EngineConfig(str(folder), device="cpu", memory_bytes=2**26, draft_model=str(folder)), None)
    assert (threads(), files()) == before
