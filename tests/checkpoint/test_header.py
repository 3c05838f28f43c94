"""Headers are hostile: every lie has its own error, and random bytes never do worse than be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.checkpoint.header import MAX_HEADER_BYTES, read_header
from layerstream.errors import CheckpointError, InvalidHeader, TruncatedFile
from safetensors.torch import save

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = b"\0" * 24) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    entries = read_header(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("F32", (3, 5)),
        "b": ("BF16", (7,)),
        "c": ("F32", (0, 4)),
    }
    extent = entries["a"].extent
    raw = path.read_bytes()[extent.offset : extent.offset + extent.num_bytes]
    assert raw == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([], "JSON list"),
        (b'{"a": 1, "a": 2}', "more than once"),
        ({"a": 1}, "expected dtype, shape"),
        ({"": GOOD}, "expected dtype, shape"),
        ({"a": {**GOOD, "dtype": "F33"}}, "dtype 'F33'"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "not a safetensors dtype"),
        ({"a": {**GOOD, "shape": [2, -3]}}, "shape"),
        ({"a": {**GOOD, "shape": [2.0, 3]}}, "shape"),
        ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "shape"),
        ({"a": {**GOOD, "data_offsets": [24, 0]}}, "data_offsets"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "data_offsets"),
        ({"a": {**GOOD, "data_offsets": [0, 20]}}, "claims 20 bytes, but F32 of shape .* takes 24"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 36]}}, "starts at byte .* inside 'a'"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(InvalidHeader, match=words):
        read_header(write(tmp_path / "x.safetensors", header, b"\0" * 64))


def test_short_files_say_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(TruncatedFile, match="3 bytes"):
        read_header(path)
    path.write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(TruncatedFile, match="claims 100 bytes"):
        read_header(path)
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidHeader, match="at most"):
        read_header(path)
    with pytest.raises(TruncatedFile, match="ends at byte"):
        read_header(write(path, {"a": GOOD}, b"\0" * 23))


@settings(max_examples=300)
@given(st.data())
def test_random_bytes_are_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = bytearray(save({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int8)}))
    if data.draw(st.booleans()):
        raw = bytes(data.draw(st.binary(max_size=200)))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
        raw = bytes(good[: data.draw(st.integers(0, len(good)))])
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.extent.offset):
        assert entry.extent.offset >= end or not entry.extent.num_bytes
        end = max(end, entry.extent.offset + entry.extent.num_bytes)
    assert end <= len(raw) or not entries
