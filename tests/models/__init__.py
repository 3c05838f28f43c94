"""Small random models of every tested family, in the files that a hub would have.

``FAMILIES`` says what each has beside the sizes that all have, ``make_model`` draws its weights. Windows and attention
chunks are shorter than the longest prompt that the tests compare, and a token passes fewer experts than there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.dense import DENSE
from tests.models.hybrids import HYBRIDS
from tests.models.mixtures import MIXTURES
from tests.models.multimodal import MULTIMODAL
from tests.models.sizes import VOCAB_SIZE, YARN, SmallModel

__all__ = ["FAMILIES", "VOCAB_SIZE", "YARN", "SmallModel", "make_model", "make_tokenizer"]

FAMILIES: dict[str, SmallModel] = {**DENSE, **MIXTURES, **HYBRIDS, **MULTIMODAL}

_TIME_STEPS = ("dt_bias", "dt_proj.bias")
SLOW = -4.0
"""Of time steps, before softplus: a state forgets a fiftieth of itself with a token, as trained ones do."""


def make_model(
    family: str, folder: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, **save_options: Any
) -> Any:
    """Write a random model of *family* to *folder* and return it: fp32, persistent buffers random too."""
    small = FAMILIES[family]
    torch.manual_seed(seed)
    model = small.loader.from_config(small.config(**sizes or {})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                scale = 0.2 if tensor.dim() > 1 else 0.1
                scales = ("norm" in name and "bias" not in name) or "layer_scalar" in name  # what is around 1
                offset = 1.0 if scales and tensor.dim() == 1 else 0.0
                if name.endswith(_TIME_STEPS):
                    offset = SLOW
                tensor.copy_(torch.randn(tensor.shape) * scale + offset)
    model.tie_weights()
    model.save_pretrained(folder, **save_options)
    return small.loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of :data:`VOCAB_SIZE` tokens with a chat template that begins with the BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        ),
    )
