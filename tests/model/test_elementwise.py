"""A value's bits do not depend on where in a tensor it lies, however many threads there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.model import elementwise
from torch.nn import functional as F
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

FUNCTIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.sigmoid, F.silu, F.gelu, F.softplus, torch.tanh)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Put their number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def repeated(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The same random row again and again."""
    row = torch.randn(width, generator=torch.Generator().manual_seed(width)) * 3
    return row.to(dtype).expand(num_rows, width).contiguous()


@settings(max_examples=60)
@given(
    st.sampled_from(FUNCTIONS),
    st.integers(1, 40),
    st.integers(1, 400) | st.integers(4000, 9000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 4),
)
def test_equal_rows_stay_equal(
    function: Callable[[torch.Tensor], torch.Tensor], num_rows: int, width: int, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    values = repeated(num_rows, width, dtype)
    found = elementwise.apply(function, values)
    assert found.dtype == dtype
    assert torch.allclose(found, function(values))
    assert torch.equal(found, found[:1].expand_as(found))
    assert torch.equal(found[:1], elementwise.apply(function, values[:1]))


def test_torch_alone_does_not_promise_it() -> None:
    """If this fails one day, the module has nothing left to do."""
    torch.set_num_threads(3)
    found = [F.silu(repeated(8, width, torch.float32)) for width in range(8000, 16000, 1000)]
    assert any(not torch.equal(rows, rows[:1].expand_as(rows)) for rows in found)


def test_columns_that_are_not_neighbours() -> None:
    both = repeated(5, 60, torch.float32)
    gate = both[:, ::2]
    assert torch.equal(elementwise.apply(F.silu, gate), elementwise.apply(F.silu, gate.contiguous()))


@pytest.mark.parametrize("num_experts", [5, 6, 50])
def test_a_router_gives_a_row_the_same_weights_in_any_place(num_experts: int) -> None:
    config = Glm4MoeConfig(hidden_size=64, n_routed_experts=num_experts, num_experts_per_tok=2)
    router = Glm4MoeTopkRouter(config).eval()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(num_experts))
    elementwise.install(router)
    with torch.inference_mode():
        for seed in range(40):
            row = torch.randn((1, 64), generator=torch.Generator().manual_seed(seed))
            for found in router(row.expand(8, 64).contiguous()):
                assert torch.equal(found, found[:1].expand_as(found))
