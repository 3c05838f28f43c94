"""Modules without weights: parameters on the meta device, buffers that are there; and what is computed with them.

accelerate's context moves every parameter to the meta device once it is registered, so each is allocated first, and by
some classes filled: the experts of one layer of a large mixture are 30 GB in fp32. Here they never take memory at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MOST_OF_A_BUFFER = 2**24
"""Numbers. What is made larger than that in a module's constructor is a parameter."""


class _LargeOnMeta(TorchFunctionMode):
    """A large tensor that is made without a device is a meta tensor."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn) and given.get("device") is None:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(size, int) for size in sizes) and prod(sizes) > MOST_OF_A_BUFFER:
                given["device"] = "meta"
        return func(*args, **given)


@contextmanager
def no_weights() -> Iterator[None]:
    """Modules made inside have no memory for their parameters."""
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


class NotThere(TorchDispatchMode):
    """Values meet weights that are not there: the result is not there either. What would depend on it is nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(item, torch.Tensor) and item.is_meta for item in flat((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func is torch.ops.aten.nonzero.default:
            return torch.empty((0, args[0].dim()), dtype=torch.long, device="meta")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*_to_meta(args), **{name: _to_meta(value) for name, value in kwargs.items()})


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    return value


def flat(value: Any) -> Iterator[Any]:
    """What *value* holds, whatever tuples and lists it is in."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    else:
        yield value
