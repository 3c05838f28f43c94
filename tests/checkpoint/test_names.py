"""Every family's files, put together again from pieces by plain reads, equal the model bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layerstream.checkpoint.header import Extent, TensorEntry
from layerstream.checkpoint.names import ParameterSource
from layerstream.checkpoint.pieces import PiecedTensor, concatenate, split, stack
from layerstream.errors import InvalidHeader, MissingTensor
from layerstream.model.skeleton import build_skeleton
from safetensors.torch import load_file, save_file

from tests.models import FAMILIES, make_model


def assemble(source: ParameterSource) -> torch.Tensor:
    memory = bytearray(source.num_bytes)
    for piece in source.pieces:
        with piece.entry.extent.path.open("rb") as file:
            file.seek(piece.entry.extent.offset + piece.source_offset)
            memory[piece.destination_offset : piece.destination_offset + piece.num_bytes] = file.read(piece.num_bytes)
    return torch.frombuffer(memory, dtype=source.dtype).view(source.shape)


OFTEN = (
    "llama-tied",
    "gpt-neox",
    "phi3",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v3",
    "gemma3n-text",
    "molmo2",
    "qwen3_vl_moe",
)
"""Families whose files differ most from their modules, or from each other."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.families) for name in FAMILIES]
)
def test_every_parameter_and_persistent_buffer_is_found(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path, max_shard_size="100KB")
    sources = build_skeleton(tmp_path).sources
    state = model.state_dict()
    assert set(sources) == set(state)
    for name, tensor in state.items():
        assert torch.equal(assemble(sources[name]), tensor), name


def test_tied_names_share_one_source_even_if_only_the_head_is_stored(tmp_path: Path) -> None:
    make_model("llama-tied", tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert skeleton.is_tied
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert build_skeleton(tmp_path).is_tied


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidHeader, match=r"'model.norm.weight' is stored with shape \[3\]; config.json says \[64\]"):
        build_skeleton(tmp_path)
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensor, match=r"nothing for 2 of \d+ parameters: model.layers.1.mlp.up_proj.weight"):
        build_skeleton(tmp_path)


def pieced(name: str, shape: tuple[int, ...]) -> tuple[PiecedTensor, torch.Tensor]:
    value = torch.randint(0, 255, shape, dtype=torch.uint8)
    return PiecedTensor.of(TensorEntry(name, "U8", shape, Extent(Path(name), 0, value.numel())), 1), value


def realise(tensor: PiecedTensor, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    memory = torch.zeros(tensor.num_bytes, dtype=torch.uint8)
    for piece in tensor.pieces:
        flat = stored[piece.entry.name].flatten()
        target = slice(piece.destination_offset, piece.destination_offset + piece.num_bytes)
        memory[target] = flat[piece.source_offset : piece.source_offset + piece.num_bytes]
    return memory.view(tensor.shape)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_moving_pieces_equals_moving_tensors(sizes: list[int], count: int, width: int, dim: int) -> None:
    stored: dict[str, torch.Tensor] = {}
    joined, expected = [], []
    for index, size in enumerate(sizes):
        shape = [2, width, 3]
        shape[dim] = size
        parts = [pieced(f"{index}.{n}", tuple(shape)) for n in range(count)]
        stored.update({part.pieces[0].entry.name: value for part, value in parts})
        joined.append(stack([part for part, _ in parts]))
        expected.append(torch.stack([value for _, value in parts]))
    whole = concatenate(joined, dim + 1)
    assert torch.equal(realise(whole, stored), torch.cat(expected, dim + 1))
    for part, value in zip(split(whole, sizes, dim + 1), expected, strict=True):
        assert torch.equal(realise(part, stored), value)
