"""Memory of the host, in one piece."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from layerstream import LayerStream, SamplingParams
from layerstream.errors import OutOfMemory
from layerstream.hardware.arena import Arena, Arenas


def test_more_than_the_system_gives_is_said() -> None:
    with pytest.raises(OutOfMemory, match=r"does not give 1024\.0 TiB of memory"):
        Arena(2**50)


def test_what_is_closed_takes_no_memory() -> None:
    arenas = Arenas()
    with arenas.collecting():
        held = Arena(2**20).tensor  # of an arena that nobody holds any more
    other = Arena(2**20).tensor
    for tensor in (held, other):
        tensor.fill_(7)
    arenas.close()
    arenas.close()
    assert int(other.sum()) == 7 * 2**20
    if hasattr(mmap, "MADV_REMOVE"):
        assert not held.any()


def test_an_engine_that_is_closed_and_held_gives_its_memory_back() -> None:
    def shared() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssShmem:")[1].split()[0])

    if not Path("/proc/self/status").is_file():
        pytest.skip("the system does not say what memory a process has")
    engine = LayerStream("demo", memory="64MiB", kv_store=None, progress=False)
    engine.generate("Where?", SamplingParams(max_tokens=1))
    before = shared()
    engine.close()
    assert before - shared() > 3000, "KiB: its weights at least"
    assert engine.stats().sweeps
