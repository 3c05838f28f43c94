from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.rotary import Rotaries, Rotary

KINDS = [  # family, name of the function, width of the angles of heads of 16
    ("llama", "apply_rotary_pos_emb", 16),
    ("cohere", "apply_rotary_pos_emb", 16),
    ("glm", "apply_rotary_pos_emb", 8),
    ("gpt_neox", "apply_rotary_pos_emb", 8),
    ("gpt_oss", "apply_rotary_pos_emb", 8),
    ("gemma3n", "apply_rotary_pos_emb", 16),
    ("ernie4_5", "apply_rotary_pos_emb", 16),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave", 16),
]


def context() -> SweepContext:
    return cast(SweepContext, SimpleNamespace(rotations={}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "name", "width"), KINDS)
def test_heads_are_rotated_as_they_were(family: str, name: str, width: int, dtype: torch.dtype) -> None:
    own = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    torch.manual_seed(1)
    rotary = Rotary(own)
    heads = [torch.randn(1, count, 6, 16).to(dtype) for count in (4, 2)][: rotary._num_heads]
    for _ in range(2):  # sweeps
        angles = [torch.randn(1, 6, width).to(dtype) for _ in range(2)]
        with sweeping(context()):
            found, expected = rotary(*heads, *angles), own(*heads, *angles)
        assert list(rotary._formulas.values()) != [None]
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        for ours, theirs in zip(
            *(([some] if rotary._num_heads == 1 else some) for some in (found, expected)), strict=True
        ):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_what_is_no_rotation_of_pairs_computes_by_itself() -> None:
    def own(q: Any, k: Any, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        return q.abs() * cos.unsqueeze(unsqueeze_dim), k

    rotary = Rotary(own)
    query, angle = torch.randn(1, 2, 3, 16), torch.randn(1, 3, 16)
    with sweeping(context()):
        assert torch.equal(rotary(query, query, angle, angle)[0], own(query, query, angle, angle)[0])
    assert list(rotary._formulas.values()) == [None]


def test_only_an_instance_is_changed() -> None:
    module = import_module("transformers.models.llama.modeling_llama")
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.0, attention_bias=False
    )
    attention, before = module.LlamaAttention(config, 0), module.apply_rotary_pos_emb
    assert Rotaries().fuse(attention)
    assert not Rotaries().fuse(attention.q_proj)
    assert module.apply_rotary_pos_emb is before
    assert isinstance(attention.forward.__globals__["apply_rotary_pos_emb"], Rotary)
