"""What a model does is found out without weights: KV by layer, latents, shared keys, windows, order, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layerstream.errors import UnsupportedModel
from layerstream.model.anatomy import Anatomy, build_own, dissect, own_class
from layerstream.model.skeleton import build_meta, build_skeleton
from layerstream.model.trace import trace
from layerstream.model.traced import Trace
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.models import FAMILIES, VOCAB_SIZE, make_model
from tests.models.refused import REFUSED

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_LOCAL = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2}
_VISION = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}


def find(config: Any) -> tuple[Anatomy, Trace]:
    anatomy = dissect(build_own(config, dtype=torch.float32))
    return anatomy, trace(anatomy)


def test_keys_and_values_of_every_layer() -> None:
    _, traced = find(transformers.LlamaConfig(**_SMALL))
    assert [layer.values for layer in traced.layers] == [2 * 2 * 16] * 4
    assert [layer.state for layer in traced.layers] == traced.keepers == [0, 1, 2, 3]
    assert not traced.is_alone
    assert not traced.lasting


def test_latents_are_what_is_cached_and_not_what_is_attended_to() -> None:
    anatomy = dissect(build_own(FAMILIES["deepseek-v3"].config(), dtype=torch.float32))
    config, traced = anatomy.model.config, trace(anatomy)
    assert traced.is_alone
    assert {layer.values for layer in traced.layers} == {config.kv_lora_rank + config.qk_rope_head_dim}


def test_windows_and_chunks_are_those_that_masks_were_asked_for() -> None:
    _, traced = find(transformers.Gemma2Config(**_SMALL, **_LOCAL))
    assert [layer.window for layer in traced.layers] == [40, None, 40, None]
    anatomy = dissect(build_own(FAMILIES["llama4-text"].config(), dtype=torch.float32))
    chunks = [layer.chunk for layer in trace(anatomy).layers]
    assert set(chunks) == {anatomy.model.config.attention_chunk_size, None}


def test_layers_of_other_sizes_and_layers_that_share() -> None:
    """Gemma 4: full layers have other heads, and keys for values; the last layers read what earlier ones cached."""
    config = transformers.Gemma4TextConfig(
        **_SMALL,
        **_LOCAL,
        attention_k_eq_v=True,
        global_head_dim=32,
        num_global_key_value_heads=1,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
    )
    anatomy, traced = find(config)
    assert [layer.values for layer in traced.layers] == [2 * 2 * 16, 2 * 1 * 32, 0, 0]
    assert [layer.state for layer in traced.layers] == [0, 1, 0, 1]
    assert traced.keepers == [0, 1]
    assert traced.lasting == {0, 1}
    assert anatomy.layer_embedding is not None


def test_modules_are_in_the_order_in_which_they_run() -> None:
    _, traced = find(transformers.Gemma3nTextConfig(**_SMALL, **_LOCAL, vocab_size_per_layer_input=VOCAB_SIZE,
        intermediate_size_=96, num_kv_shared_layers=0, hidden_size_per_layer_input=8, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4))  # fmt: skip
    places = traced.order
    assert places["model.altup_projections.0"] < places["model.layers.0"] < places["model.altup_unembed_projections.0"]
    assert "model.layers.0.altup" in traced.lists
    assert "model.layers.0" in traced.mingled
    assert traced.copies == 4  # hidden states that AltUp keeps apart


def test_what_is_computed_with_a_mask_is_not_that_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may add to what it asked for (Doge): then it is not known what its rows see."""
    attend = LlamaAttention.forward

    def changed(self: Any, *args: Any, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        return attend(self, *args, attention_mask=attention_mask.float() + 1.0, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", changed)
    with pytest.raises(UnsupportedModel, match="mask of its own making"):
        find(transformers.LlamaConfig(**_SMALL))


def test_a_model_of_several_is_the_one_that_reads() -> None:
    """Qwen2.5-Omni: one part of it thinks, others talk."""
    anatomy, traced = find(transformers.Qwen2_5OmniConfig())
    assert all(name.startswith("thinker.") for name in anatomy.model.state_dict())
    assert len(traced.layers) == 28


def test_the_class_that_saved_a_checkpoint_is_what_it_is_opened_as() -> None:
    config = transformers.Qwen3VLConfig(text_config=_SMALL, vision_config=_VISION)
    assert own_class(config) is transformers.Qwen3VLForConditionalGeneration
    anatomy, traced = find(config)
    names = anatomy.model.state_dict()
    assert not any("visual" in name for name in names)
    assert anatomy.causal is anatomy.model
    assert anatomy.trunk is not anatomy.decoder
    assert len(traced.layers) == 4
    assert own_class(transformers.ViTConfig()) is None


_SAYS = {
    "minimax": r"cache of its own class \(MiniMaxCache\)",
    "recurrent_gemma": "recurrent state by functions",
    "rwkv": "neither keys and values nor states",
    "zamba": r"layer 0 keeps more than one state of a kind \(recurrent\)",
    "zamba2": r"layers share a module that attends \(.*shared_transformer.self_attn\)",
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "sparse attention"),
    **dict.fromkeys(("bloom", "codegen", "gpt_neo", "gptj", "mpt"), "bypasses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_mechanism(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name!r}.*{_SAYS[name]}.*use another family, or plain transformers"):
        trace(dissect(build_meta(REFUSED[name].config(), torch.float32, trust_remote_code=False)))


@pytest.mark.parametrize("name", ["gemma4-text-moe", "hunyuan-v1-moe", "qwen3-moe"])
def test_experts_come_as_they_are_routed_to(name: str, tmp_path: Path) -> None:
    """Also where a layer has them without a block (Gemma 4), or blocks are numbered as layers are (Hunyuan)."""
    name = next(key for key in FAMILIES if key.replace("_", "-") == name)
    make_model(name, tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert len(skeleton.routed) == 3
    assert {node.top_k for node in skeleton.routed} == {2}
    assert skeleton.routed_body != skeleton.body


def test_what_is_no_language_model_or_sees_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        find(transformers.RecurrentGemmaConfig(**_SMALL, lru_width=64, block_types=["recurrent", "attention"]))
    with pytest.raises(UnsupportedModel, match="no language model"):
        find(transformers.ViTConfig())
    with pytest.raises(UnsupportedModel, match="sees 0 positions"):
        find(transformers.Gemma2Config(**_SMALL, **{**_LOCAL, "sliding_window": 0}))


@pytest.mark.parametrize("family", [name for name, small in FAMILIES.items() if small.whole is None])
def test_nothing_of_the_trace_is_left_in_the_model(family: str) -> None:
    """Its configs name the implementations that they named before, and no module has a hook."""
    anatomy = dissect(build_own(FAMILIES[family].config(), dtype=torch.float32, attn_implementation="eager"))
    before = anatomy.decoder.config._attn_implementation
    trace(anatomy)
    assert anatomy.decoder.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in anatomy.decoder.modules())
