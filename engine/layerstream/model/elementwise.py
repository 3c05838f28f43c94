"""Functions of single values (activations, the sigmoids of routers), free of where in a tensor a value lies.

The processor computes such a function a vector at a time, and what is left at the end one by one, by another formula:
the last bit may differ. With several threads each leaves something, in the middle of a row. So a row of a row block
would have other bits in the third place than in the first, and which place a row has depends on its neighbours. Here
every thread is given whole vectors, and what is left over is padded to one.

It matters where row blocks hold rows of several sequences and rows are not as wide as whole vectors: in activations,
in routers, in what gates an expert. Attention, soft caps and the like are called with the rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import activations

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

VECTOR = 128  # values: a multiple of what one step of a kernel takes, in any dtype on any processor
GRAIN = 32768  # values that torch gives a thread at the least: at::internal::GRAIN_SIZE

_STEADIED = frozenset({torch.sigmoid, torch.Tensor.sigmoid, F.silu, F.gelu, F.softplus, torch.tanh, torch.Tensor.tanh})
_ACTIVATIONS = tuple({kind[0] if isinstance(kind, tuple) else kind for kind in activations.ACT2CLS.values()})


def install(model: torch.nn.Module, formulas: Collection[torch.nn.Module] = ()) -> None:
    """Have what *model* computes of single values be steady: its activations, modules with a matrix of their own that
    are more than a product with it (routers), and *formulas*."""
    for module in model.modules():
        if isinstance(module, _ACTIVATIONS):
            _adapt(module)
        elif module in formulas or _has_formula(module):
            _adapt_formula(module)


def steady() -> AbstractContextManager[object]:
    """Within, torch's own functions compute this way. It costs every call of torch a microsecond."""
    return _Steady()


def apply(function: Function, values: torch.Tensor) -> torch.Tensor:
    """*function* of *values*, each by the same formula."""
    if not values.is_cpu:
        return function(values)
    flat = values.contiguous().view(-1)
    whole = _whole(len(flat))
    if whole == len(flat):
        return function(flat).view(values.shape)
    rest = F.pad(flat[whole:], (0, -len(flat) % VECTOR))
    rest = apply(function, rest)[: len(flat) - whole]
    return (torch.cat([function(flat[:whole]), rest]) if whole else rest).view(values.shape)


def _whole(count: int) -> int:
    """Of *count* values, as many as may be computed at once: each thread gets whole vectors."""
    while count % (step := VECTOR * min(torch.get_num_threads(), -(-count // GRAIN) or 1)):
        count -= count % step
    return count


def _has_formula(module: torch.nn.Module) -> bool:
    is_plain = type(module) is torch.nn.Linear or isinstance(module, torch.nn.Embedding)
    return not is_plain and any(weight is not None and weight.dim() == 2 for weight in module._parameters.values())


def _adapt(module: torch.nn.Module) -> None:
    forward = module.forward
    module.forward = lambda values: apply(forward, values)


def _adapt_formula(module: torch.nn.Module) -> None:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with steady():
            return forward(*args, **kwargs)

    module.forward = run


class _Steady(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _STEADIED:
            return apply(lambda values: func(values, *args[1:], **(kwargs or {})), args[0])
        return func(*args, **(kwargs or {}))
