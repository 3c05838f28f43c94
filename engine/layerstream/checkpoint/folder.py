"""A checkpoint folder: its safetensors files, as one set of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from layerstream.checkpoint.header import TensorEntry, read_header
from layerstream.checkpoint.packed import PackedTensor, find_packed
from layerstream.errors import CheckpointNotFound, InvalidHeader, MissingTensor, UnsupportedFormat

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SIDE_FILES = ("adapter_", "consolidated", "training_args", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, wherever they lie; *packed* are the quantised matrices among them, by their parameter's name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        packed = [entry for matrix in self.packed.values() for entry in matrix.planes.values()]
        return sum(entry.extent.num_bytes for entry in (*self.tensors.values(), *packed))


def open_folder(folder: Path) -> Checkpoint:
    """Read the headers of *folder*: one file, or shards of any naming, with or without an index.

    Raises:
        CheckpointNotFound: no folder, no config or no weights, or a shard is missing.
        UnsupportedFormat: pickles, or weights quantised by an unknown method.
        InvalidHeader, TruncatedFile, MissingTensor: the files contradict each other or themselves.
    """
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder}: no such folder; expected one with config.json and *.safetensors")
    quantisation = _quantisation(read_json(folder / "config.json"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    tensors = _from_index(folder, _main_index(indices)) if indices else _merge(_weight_files(folder))
    if quantisation is None:
        return Checkpoint(folder, tensors)
    return Checkpoint(folder, *find_packed(tensors, quantisation))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(item.name for item in path.parent.iterdir())[:8]) or "nothing"
        raise CheckpointNotFound(f"{path.parent}: there is no {path.name}; found: {found}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidHeader(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InvalidHeader(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def _quantisation(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the config says about how the weights are quantised."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        quantisation = part.get("quantization_config")
        if quantisation:
            return quantisation if isinstance(quantisation, dict) else {}
    return None


def _weight_files(folder: Path) -> list[Path]:
    """All safetensors files that can be the model's; side files only count where nothing else is there."""
    files = sorted(folder.glob("*.safetensors"))
    model_files = [path for path in files if not path.name.startswith(_SIDE_FILES)] or files
    if model_files:
        return model_files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedFormat(
            f"{folder}: weights only as pickles ({', '.join(pickles[:3])}), which can run code when opened; "
            "save them once with transformers' save_pretrained(), which writes safetensors"
        )
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        raise CheckpointNotFound(f"{folder}: only GGUF files; pass one of them as the model: {', '.join(files[:5])}")
    raise CheckpointNotFound(f"{folder}: no *.safetensors files")


def _main_index(indices: list[Path]) -> Path:
    named = [path for path in indices if path.name == "model.safetensors.index.json"]
    return (named or indices)[0]


def _from_index(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidHeader(f"{index}: no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise InvalidHeader(f"{index}: {name!r} is not the name of a file in the folder")
        if not (folder / name).is_file():
            raise CheckpointNotFound(f"{folder}: shard {name} of {len(names)} is missing, {index.name} names it")
    tensors = _merge(folder / name for name in names)
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].extent.path.name != name:
            raise MissingTensor(f"{folder}: {index.name} says that {tensor!r} is in {name}, but it is not")
    return tensors


def _merge(paths: Iterable[Path]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name in tensors:
                raise InvalidHeader(f"{path}: tensor {name!r} is also in {tensors[name].extent.path.name}")
            tensors[name] = entry
    return tensors
