"""The model's tokenizer, from its folder or out of a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from layerstream.errors import UnsupportedFormat


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the model at *path*, a folder or a ``.gguf`` file.

    Beside a GGUF file a ``tokenizer.json`` is taken, else what its metadata have.

    Raises:
        UnsupportedFormat: there is neither.
    """
    if path.suffix != ".gguf":
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if (path.parent / "tokenizer.json").is_file():  # what the metadata have is converted, and some have none
        return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError) as error:
        raise UnsupportedFormat(
            f"{path}: its metadata have no tokenizer that transformers can build ({error!r}); put the model's "
            "tokenizer.json beside it"
        ) from error
