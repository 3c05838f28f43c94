"""A model of which only the config is here: what its files would be like, in 16 bits, for plans."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from layerstream.checkpoint.config import check_config
from layerstream.checkpoint.folder import CONFIG, MAX_CONFIG_BYTES
from layerstream.checkpoint.header import stored_bytes
from layerstream.checkpoint.hub import headers_folder, write_empty
from layerstream.checkpoint.names import DTYPES
from layerstream.checkpoint.reading import explained, read_object
from layerstream.checkpoint.selection import SINGLE
from layerstream.model.anatomy import dissect
from layerstream.model.families import check_supported
from layerstream.model.skeleton import build_meta, load_config

logger = logging.getLogger(__name__)

LARGEST = ((2**18,),) * 1024  # there are no weights to hold the config against: sizes and layers of the largest models
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "adapter_config.json")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def has_config_alone(folder: Path) -> bool:
    """Whether *folder* has a config, and nothing that could be weights."""
    return (folder / CONFIG).is_file() and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def assume_weights(folder: Path) -> Path:
    """A folder with the config of *folder*, and files of weights that are as long as it says, and empty.

    Raises:
        UnsupportedModel: the family cannot run.
        CheckpointError: the config cannot be read, or makes no model.
    """
    said = read_object(folder / CONFIG, MAX_CONFIG_BYTES)
    check_config(said, str(folder / CONFIG), LARGEST)
    config = load_config(folder)
    check_supported(config)
    dtypes = (part.dtype for part in (config, config.get_text_config(decoder=True)))
    stored = torch.float16 if torch.float16 in dtypes else torch.bfloat16
    with explained(f"{folder}: no model can be built as its config says"):
        model = build_meta(config, stored, trust_remote_code=False)
        dissect(model)
    config.dtype = stored
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            dtype = _NAMES[tensor.dtype]
            start, end = end, end + stored_bytes(dtype, tuple(tensor.shape))
            entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    target = headers_folder(f"config-{folder.resolve().name}-{digest}")
    config.save_pretrained(target)
    write_empty(target / SINGLE, entries)
    return target
