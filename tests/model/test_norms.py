import pytest
import torch
from layerstream.model.norms import fuse
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm", [LlamaRMSNorm(48, 1e-5), Gemma3RMSNorm(48), Llama4TextL2Norm(1e-3), CohereLayerNorm(48, eps=1e-5)]
)
def test_norms_are_what_they_were(norm: nn.Module, dtype: torch.dtype) -> None:
    norm.__dict__.pop("forward", None)
    for seed in range(2):  # other weights come
        torch.manual_seed(seed)
        for name in norm._parameters:
            norm._parameters[name] = nn.Parameter(torch.randn(48).to(dtype), requires_grad=False)
        rows = (torch.randn(1, 5, 3, 48) * 0.01).to(dtype)
        expected = type(norm).forward(norm, rows)
        assert seed or fuse(norm, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(norm(rows), expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("norm", [Qwen3NextRMSNormGated(48), OlmoLayerNorm(48), nn.LayerNorm(48), nn.Linear(48, 48)])
def test_what_is_another_formula_stays(norm: nn.Module) -> None:
    assert not fuse(norm, torch.bfloat16)
    assert "forward" not in vars(norm)


def test_rows_in_another_dtype_than_the_weight_go_the_old_way() -> None:
    norm = LlamaRMSNorm(48)
    assert fuse(norm, torch.bfloat16)
    rows = torch.randn(2, 48).to(torch.bfloat16)
    assert torch.equal(norm(rows), LlamaRMSNorm.forward(norm, rows))
