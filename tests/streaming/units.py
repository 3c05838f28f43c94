"""Units of random bytes, in a file of their own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from layerstream.checkpoint.header import read_header
from layerstream.checkpoint.names import ParameterSource
from layerstream.checkpoint.pieces import PiecedTensor
from layerstream.hardware.reader import DirectReader
from layerstream.streaming.layout import Part, UnitLayout, lay_out
from safetensors.torch import save_file


def hold_reads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No read begins before the event that is returned is set."""
    gate = threading.Event()
    read = DirectReader._read

    def held(self: DirectReader, job, bounce) -> None:
        assert gate.wait(20)
        read(self, job, bounce)

    monkeypatch.setattr(DirectReader, "_read", held)
    return gate


def write_units(folder: Path, count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[UnitLayout]]:
    """Tensors ``unit<i>.w`` of different sizes, and a unit for each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"unit{i}.w": torch.randn(37 + 100 * (i % 5), 61, generator=generator) for i in range(count)}
    return tensors, lay_out_units(folder, tensors)


def lay_out_units(folder: Path, tensors: dict[str, torch.Tensor]) -> list[UnitLayout]:
    """Write *tensors* and make a unit of each."""
    save_file(tensors, folder / "model.safetensors")
    entries = read_header(folder / "model.safetensors")
    sources = {
        name: ParameterSource(name, torch.float32, entry.shape, PiecedTensor.of(entry, 4).pieces)
        for name, entry in entries.items()
    }
    return [lay_out(name, [Part.whole(name, source)]) for name, source in sorted(sources.items())]
