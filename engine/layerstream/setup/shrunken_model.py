"""A small random model of a config, in the files that a hub would have: what a self-check compares with.

Weights and persistent buffers are random, so that a parameter that is forgotten or mixed up makes a difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from layerstream.model.anatomy import make_own
from layerstream.model.quiet import no_progress_bars
from layerstream.setup.shrunken import VOCAB_SIZE

_SPREAD = 0.15
_TIME_STEPS = ("dt_bias", "dt_proj.bias")
_SLOW = -4.0  # before softplus: a state forgets a fiftieth of itself with a token


def write_model(config: Any, folder: Path, *, trust_remote_code: bool = False, spread: float = _SPREAD) -> Any:
    """Write a random model of *config* and a tokenizer of its vocabulary to *folder*.

    Returns:
        The model: fp32, transformers' plain attention.

    Raises:
        UnsupportedModel: transformers has no class for it that generates text.
        Exception: what the class says of the config.
    """
    model = draw_model(config, trust_remote_code=trust_remote_code, spread=spread)
    with no_progress_bars():
        model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model


def draw_model(config: Any, *, trust_remote_code: bool = False, spread: float = _SPREAD) -> Any:
    """A random model of *config*: fp32, transformers' plain attention. Raises as :func:`write_model`."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = make_own(config, trust_remote_code, dtype=torch.float32, attn_implementation="eager")
        _fill(model, spread)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _fill(model: Any, spread: float) -> None:
    """Norms are about one, all else about nothing; steps of recurrences are slow, so that states last."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            offset = 1.0 if "norm" in name and tensor.dim() == 1 and "bias" not in name else 0.0
            if name.endswith(_TIME_STEPS):
                offset = _SLOW
            tensor.copy_(torch.randn(tensor.shape) * spread + offset)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"<{token}>": token for token in range(VOCAB_SIZE)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")))
