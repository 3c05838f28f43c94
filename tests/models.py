"""Small random models of every tested family, in the files that a hub would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320

# fmt: off
_SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama4-text": (
        "Llama4Text",
        {
            "num_hidden_layers": 4, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 48, "no_rope_layer_interval": 4, "floor_scale": 32,
            "attn_scale": 0.1, "attn_temperature_tuning": True,
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen2-moe": ("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 48}),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", _MOE),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 40, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {"sliding_window": 40, "num_hidden_layers": 7, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 40}),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40, "rope_parameters": YARN},
    ),
    "glm": ("Glm", {"partial_rotary_factor": 0.5}),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25, "sliding_window": 40, "num_hidden_layers": 5}),
    "granite": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "gpt-neox": ("GPTNeoX", {"tie_word_embeddings": False, "num_key_value_heads": 4}),  # it has no groups
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "starcoder2": ("Starcoder2", {"sliding_window": 40}),
    "arcee": ("Arcee", {}),
    "apertus": ("Apertus", {}),
    "ernie4.5": ("Ernie4_5", {}),
    "exaone4": ("Exaone4", {"sliding_window": 40, "num_hidden_layers": 4}),
    "glm4-moe": ("Glm4Moe", {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "granite-moe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("Helium", {}),
    "olmo3": ("Olmo3", {"sliding_window": 40, "num_hidden_layers": 4}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "seed-oss": ("SeedOss", {}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "moe_intermediate_size": 48, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 24,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
        },
    ),
}


# fmt: on


def make_model(
    family: str, folder: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, **save_options: Any
) -> Any:
    """Write a random model of *family* to *folder* and return it: fp32, persistent buffers random too."""
    prefix, changes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SMALL, **changes, **(sizes or {})})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                scale = 0.2 if tensor.dim() > 1 else 0.1
                offset = 1.0 if "norm" in name and tensor.dim() == 1 and "bias" not in name else 0.0
                tensor.copy_(torch.randn(tensor.shape) * scale + offset)
    model.tie_weights()
    model.save_pretrained(folder, **save_options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


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
