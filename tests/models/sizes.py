"""What a small model is, and the sizes that all have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

VOCAB_SIZE = 320
WINDOW = 40
"""Tokens that a sliding window sees: fewer than the longest prompt that the tests compare."""

# fmt: off
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LOCAL, FULL = "sliding_attention", "full_attention"
LOCAL_AND_GLOBAL: Mapping[str, Any] = {"sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, FULL]}
SHARED_KV: Mapping[str, Any] = {
    "num_hidden_layers": 6, "sliding_window": WINDOW, "layer_types": [LOCAL, FULL, LOCAL, LOCAL, LOCAL, FULL],
    "num_kv_shared_layers": 3, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8,
}
"""Of Gemma: the last layers read what the last layers of their kind before them cached, and every layer has inputs of
its own."""
MOE: Mapping[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED: Mapping[str, Any] = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GROUPED: Mapping[str, Any] = {**ROUTED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
FEW_LOCAL: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE_BUT_ONE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LATENT: Mapping[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8,
}
# fmt: on


@dataclass(frozen=True)
class SmallModel:
    """A small random model.

    Attributes:
        model_type: transformers' name of its config.
        changes: what its language model's config says beside :data:`SIZES`.
        whole: of a checkpoint that sees or hears: what its own config says beside that, its towers among that;
            ``None``: it is a language model.
    """

    model_type: str
    changes: Mapping[str, Any]
    whole: Mapping[str, Any] | None = None

    def config(self, **sizes: Any) -> Any:
        """transformers' config of it, with *sizes* of its language model."""
        text = {**SIZES, **self.changes, **sizes}
        if self.whole is None:
            return AutoConfig.for_model(self.model_type, **text)
        return AutoConfig.for_model(self.model_type, text_config=text, **copy.deepcopy(dict(self.whole)))

    @property
    def loader(self) -> Any:
        """transformers' class that finds its class."""
        if self.whole is None:
            return AutoModelForCausalLM
        sees = self.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        return AutoModelForImageTextToText if sees else AutoModelForMultimodalLM


def text(model_type: str, **changes: Any) -> SmallModel:
    """A language model."""
    return SmallModel(model_type, changes)


def whole(model_type: str, changes: Mapping[str, Any], **others: Any) -> SmallModel:
    """A checkpoint that sees or hears: *changes* are its language model's, *others* its own."""
    return SmallModel(model_type, changes, others)
