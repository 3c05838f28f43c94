"""A small random model of a config, in the files that a hub would have: what a self-check compares with.

Weights and persistent buffers are random, so that a parameter that is forgotten or mixed up makes a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.utils import logging

from layerstream.errors import UnsupportedModel
from layerstream.model.anatomy import own_class
from layerstream.setup.shrunken import VOCAB_SIZE

_SPREAD = 0.15


def write_model(config: Any, folder: Path, *, trust_remote_code: bool = False, spread: float = _SPREAD) -> Any:
    """Write a random model of *config* and a tokenizer of its vocabulary to *folder*.

    Returns:
        The model: fp32, transformers' plain attention.

    Raises:
        UnsupportedModel: transformers has no class for it that generates text.
        Exception: what the class says of the config.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    own: Any = None if trust_remote_code and hasattr(config, "auto_map") else own_class(config)
    if own is None and not trust_remote_code:
        raise UnsupportedModel(f"transformers has no class of {config.model_type!r} that generates text")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        if own is not None:
            model = own._from_config(config, **options)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, **options)
        _fill(model, spread)
    model.tie_weights()
    with _no_bars():
        model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model.eval()


@contextmanager
def _no_bars() -> Iterator[None]:
    """A model of a megabyte is written without a progress bar."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@torch.no_grad()
def _fill(model: Any, spread: float) -> None:
    """Norms are about one, all else about nothing."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            offset = 1.0 if "norm" in name and tensor.dim() == 1 and "bias" not in name else 0.0
            tensor.copy_(torch.randn(tensor.shape) * spread + offset)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"<{token}>": token for token in range(VOCAB_SIZE)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")))
