"""The file format: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layerstream.store import segment
from layerstream.store.segment import DamagedSegment, SegmentInfo, SegmentWriter, padded, read_info, verify

from tests.store.pages import PAGE_TOKENS, SHAPES, chain, new_pages

KEYS = chain(1, 2, 3)


def write(folder: Path) -> tuple[Path, SegmentInfo]:
    pages = new_pages(KEYS)
    with SegmentWriter(folder) as writer:
        for layer in range(len(SHAPES)):
            writer.write_layer(pages.encode_layer(layer))
        info = SegmentInfo(
            "n" * 40, KEYS, b"", PAGE_TOKENS, "none", tuple(writer.encoded_bytes), SHAPES, tuple(writer.checksums), 2.5
        )
        size = writer.commit(info)
    path = folder / info.name
    assert path.stat().st_size == size
    return path, info


def test_a_footer_says_what_was_written(tmp_path: Path) -> None:
    path, info = write(tmp_path)
    assert read_info(path) == info
    assert verify(path, info) == []
    assert [*tmp_path.iterdir()] == [path], "no temporary file is left"


def test_layers_are_contiguous_and_aligned(tmp_path: Path) -> None:
    path, info = write(tmp_path)
    assert all(offset % 4096 == 0 for offset in info.layer_offsets)
    size = path.stat().st_size
    assert size - info.layer_offsets[-1] < 4096, "nothing but the footer stands after the last layer"


def test_nothing_is_left_of_a_segment_that_was_not_finished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SegmentWriter(tmp_path) as writer:  # noqa: PT012
        writer.write_layer(new_pages(KEYS).encode_layer(0))
        raise RuntimeError
    assert not [*tmp_path.iterdir()]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    whole = path.read_bytes()
    for length in [0, 1, 23, 24, 4096, len(whole) - 1, len(whole) - 24]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedSegment):
            read_info(path)


@pytest.mark.parametrize("page", range(3))
@pytest.mark.parametrize("layer", range(3))
def test_one_flipped_bit_is_found_where_it_is(page: int, layer: int, tmp_path: Path) -> None:
    path, info = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[info.layer_offsets[layer] + page * padded(info.encoded_bytes[layer]) + 17] ^= 0x10
    path.write_bytes(data)
    assert verify(path, read_info(path)) == [page]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_footer_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path, info = write(tmp_path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(info.layer_offsets[-1], len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(DamagedSegment):
        read_info(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": ()},
        {"keys": KEYS * 6},
        {"encoded_bytes": (0, 256, 256)},
        {"encoded_bytes": (2**40, 256, 256)},
        {"checksums": ((1,), (1,), (1,))},
        {"shapes": SHAPES[:2]},
        {"page_tokens": 0},
    ],
)
def test_a_footer_that_lies_with_a_right_checksum(changes: dict, tmp_path: Path) -> None:
    path, info = write(tmp_path)
    body = path.read_bytes()[: info.layer_offsets[-1]]
    path.write_bytes(body + b"".join(segment._footer(dataclasses.replace(info, **changes))))
    with pytest.raises(DamagedSegment):
        read_info(path)


def test_an_absurd_length_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    path.write_bytes(b"\0" * 100 + struct.pack("<8sIIQ", b"LSKVPAGE", 1, 0, 2**60))
    with pytest.raises(DamagedSegment, match="a footer of 1152921504606846976 bytes"):
        read_info(path)
