"""A checkpoint folder: its safetensors files, as one set of tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from layerstream.checkpoint.header import TensorEntry, read_header
from layerstream.checkpoint.packed import PackedTensor, find_packed
from layerstream.checkpoint.reading import read_object
from layerstream.checkpoint.selection import ADAPTER_CONFIG, Selection, select_files
from layerstream.errors import CheckpointNotFound, InvalidHeader

logger = logging.getLogger(__name__)

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 * 2**20
_OWN_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where older tools wrote what stands in ``quantization_config`` today, and which methods they are of."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, wherever they lie; *packed* are the quantised matrices among them, by their parameter's name.
    *config* is what ``config.json`` says."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        packed = [entry for matrix in self.packed.values() for entry in matrix.planes.values()]
        return sum(entry.extent.num_bytes for entry in (*self.tensors.values(), *packed))


def open_folder(folder: Path) -> Checkpoint:
    """Read the headers of *folder*: one file, or shards of any naming, with or without an index.

    Raises:
        CheckpointNotFound: no folder, no config or no weights, or a shard is missing.
        UnsupportedFormat: pickles, an adapter alone, or weights quantised by an unknown method.
        InvalidHeader, TruncatedFile: the files contradict each other or themselves.
    """
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder}: no such folder; expected one with {CONFIG} and *.safetensors")
    names = {path.name for path in folder.iterdir()}
    if CONFIG not in names and ADAPTER_CONFIG in names:
        select_files(folder, names)  # says that it is an adapter, if nothing else is there
    config = read_object(folder / CONFIG, MAX_CONFIG_BYTES)
    named = config.get("transformers_weights")
    selection = select_files(folder, names, named if isinstance(named, str) else None)
    _say_what_is_left_out(folder, selection)
    for name in selection.left_out:
        if name.endswith(".index.json"):
            _weight_map(folder / name)  # not followed, but a hostile one is no neighbour
    if selection.index is None:
        tensors = _merge({name: read_header(folder / name) for name in selection.files}, {})
    else:
        tensors = _from_index(folder, folder / selection.index)
    quantisation = _quantisation(config) or _own_quantisation(folder, names, tensors)
    if quantisation is None:
        return Checkpoint(folder, tensors, config=config)
    return Checkpoint(folder, *find_packed(tensors, quantisation), config)


def _quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the config says about how the weights are quantised."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        quantisation = part.get("quantization_config") or part.get("compression_config")
        if quantisation:
            return quantisation if isinstance(quantisation, dict) else {}
    return None


def _own_quantisation(folder: Path, names: Iterable[str], tensors: Iterable[str]) -> dict[str, Any] | None:
    """What a file of the tool that quantised them says, where the config says nothing."""
    if not any(name.endswith(".qweight") for name in tensors):
        return None
    for name, method in _OWN_CONFIGS.items():
        if name in names:
            return {"quant_method": method, **read_object(folder / name, MAX_CONFIG_BYTES)}
    return None


def _say_what_is_left_out(folder: Path, selection: Selection) -> None:
    if selection.left_out:
        logger.warning(
            "%s: the weights are those of %s, as for transformers; not read: %s",
            folder,
            selection.files[0],
            ", ".join(selection.left_out[:4]) + (", …" if len(selection.left_out) > 4 else ""),
        )
    if selection.adapter:
        logger.warning(
            "%s: an adapter lies beside the model and is not applied: the answers are the plain model's; to have it, "
            "load both with peft, merge_and_unload() and save_pretrained(), and open what that writes",
            folder,
        )


def _from_index(folder: Path, index: Path) -> dict[str, TensorEntry]:
    """The tensors of the files that *index* names; of one that two of them have, that in the file that it says.

    Tensors that it names and no file has are left to whoever needs them.
    """
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        path = folder / name
        if not path.exists() and not path.is_symlink():
            raise CheckpointNotFound(f"{folder}: shard {name} of {len(names)} is missing, {index.name} names it")
    tensors = _merge({name: read_header(folder / name) for name in names}, weight_map)
    if absent := [tensor for tensor in weight_map if tensor not in tensors]:
        logger.info("%s names %d tensors that no file has, %r among them", index, len(absent), absent[0])
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as *index* has it: of names that lead nowhere else."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidHeader(f"{index}: no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if Path(name).name != name or name in {"", ".."} or "\0" in name:
            raise InvalidHeader(f"{index}: {name!r} is not the name of a file in the folder")
    return weight_map


def _merge(files: Mapping[str, Mapping[str, TensorEntry]], decides: Mapping[str, str]) -> dict[str, TensorEntry]:
    """The tensors of all *files*; *decides* names the file of a tensor that several have."""
    tensors: dict[str, TensorEntry] = {}
    for name, entries in files.items():
        for tensor, entry in entries.items():
            chosen = decides.get(tensor, "")
            if chosen != name and tensor in files.get(chosen, ()):
                continue
            if tensor in tensors:
                raise InvalidHeader(
                    f"{entry.extent.path}: tensor {tensor!r} is also in {tensors[tensor].extent.path.name}, and no "
                    "index says which counts; delete the file that is not the model's"
                )
            tensors[tensor] = entry
    return tensors
