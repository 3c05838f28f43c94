"""The model's tokenizer, from its folder or out of a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the model at *path*, a folder or a ``.gguf`` file."""
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
