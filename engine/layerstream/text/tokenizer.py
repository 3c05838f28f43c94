"""The model's tokenizer, from its folder or out of a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import read_gguf_metadata

from layerstream.checkpoint.reading import check_side_files, explained, read_object
from layerstream.errors import InvalidHeader, UnsupportedFormat
from layerstream.text import gguf_splits

_PROCESSOR_TEMPLATE = "chat_template.json"
MAX_TEMPLATE_BYTES = 16 * 2**20
MAX_TOKEN_ID = 2**24  # there are tables by token id


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of the model at *path*, a folder or a ``.gguf`` file.

    Beside a GGUF file a ``tokenizer.json`` is taken, else what its metadata have.

    Raises:
        UnsupportedFormat: there is neither, or how the latter splits text is not known.
        CheckpointError: its files cannot be read, or transformers refuses what they say.
    """
    if path.suffix != ".gguf":
        return _of_folder(path, trust_remote_code)
    if (path.parent / "tokenizer.json").is_file():  # what the metadata have is converted, and some have none
        return _of_folder(path.parent, trust_remote_code)
    try:
        said, _ = read_gguf_metadata(str(path))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError) as error:
        raise UnsupportedFormat(
            f"{path}: its metadata have no tokenizer that transformers can build ({error!r}); put the model's "
            "tokenizer.json beside it"
        ) from error
    if said.get("tokenizer.ggml.model") == "gpt2":
        name = said.get("tokenizer.ggml.pre")
        if not gguf_splits.is_known(name):
            raise UnsupportedFormat(
                f"{path}: how its tokenizer splits text is called {name!r:.40}, which is not known here; put the "
                "model's tokenizer.json beside it"
            )
        gguf_splits.split_as(name, tokenizer.backend_tokenizer)
    return tokenizer


def _of_folder(folder: Path, trust_remote_code: bool) -> Any:
    check_side_files(folder)
    with explained(f"{folder}: transformers cannot make a tokenizer of its files"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > MAX_TOKEN_ID:
        raise InvalidHeader(f"{folder}: its tokenizer has a token {largest}; at most {MAX_TOKEN_ID} are accepted")
    path = folder / _PROCESSOR_TEMPLATE
    if not getattr(tokenizer, "chat_template", None) and path.exists():
        template = read_object(path, MAX_TEMPLATE_BYTES).get("chat_template")
        if not isinstance(template, str):
            raise InvalidHeader(f"{path}: chat_template is {template!r:.80}, expected a template; fetch it again")
        tokenizer.chat_template = template  # transformers reads that file for a whole processor alone
    return tokenizer
