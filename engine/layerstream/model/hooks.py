"""What is hung onto transformers' modules: weights come and go, and rows pass one row block at a time.

Only instances are touched, never classes: ``forward`` of a module becomes a wrapper that (1) waits for the module's
weights and binds them as views, (2) calls the module's own forward once per row block, (3) lets the weights go.
Between sweeps every streamed parameter is the meta tensor it was built as.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch

from layerstream.hardware.nested import tensors_in
from layerstream.model.context import SweepContext, current
from layerstream.model.routing import gathering

Residence: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Makes a module's weights present for the time of the context."""


@dataclass(frozen=True, slots=True)
class _Target:
    """One parameter or persistent buffer of a module."""

    holder: dict[str, Any]  # ``_parameters`` or ``_buffers`` of the owner
    name: str
    key: str
    dtype: torch.dtype
    meta: Any


class Binding:
    """The parameters and persistent buffers that the tensors of one unit become.

    Args:
        module: the unit's module.
        path: its path, to name tensors as the state dict does.
        keys: the state dict names that belong to the unit.
        dtypes: the dtype each is computed in.
    """

    def __init__(self, module: torch.nn.Module, path: str, keys: set[str], dtypes: Mapping[str, torch.dtype]) -> None:
        self._targets = [
            _Target(holder, name, key, dtypes[key], holder[name])
            for key, holder, name in named_holders(module, path)
            if key in keys
        ]

    def bind(self, tensors: Mapping[str, Any]) -> None:
        """Put *tensors* in place of the meta ones, converted to the compute dtype where they are stored in another;
        what is no tensor (quantised experts) as it is."""
        for target in self._targets:
            value = tensors[target.key]
            target.holder[target.name] = value.to(target.dtype) if isinstance(value, torch.Tensor) else value

    def unbind(self) -> None:
        """Put the meta tensors back."""
        for target in self._targets:
            target.holder[target.name] = target.meta


def call_instead(module: torch.nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Have the forward of *module*, of this instance alone, call *functions* by the names of its globals."""
    forward = inspect.unwrap(type(module).forward)
    function = FunctionType(
        forward.__code__,
        {**forward.__globals__, **functions},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    function.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(function, module)


def named_holders(module: torch.nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """``(state dict name, dict that holds it, name in that dict)`` for all of *module*'s weights."""
    for owner_path, owner in module.named_modules(prefix=path):
        prefix = f"{owner_path}." if owner_path else ""
        for holder in (owner._parameters, owner._buffers):
            for name, tensor in holder.items():
                if tensor is not None and name not in owner._non_persistent_buffers_set:
                    yield prefix + name, holder, name


def wrap(module: torch.nn.Module, residence: Residence = nullcontext, *, routes: bool = False) -> None:
    """Run *module* one row block at a time, inside *residence*.

    Args:
        routes: whether it has experts that come as they are routed to, once for all row blocks.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        context = current()
        with residence():
            if context.is_single_block:
                return forward(*args, **kwargs)
            return _by_row_block(context, forward, args, kwargs, routes=routes)

    module.forward = run


def _by_row_block(
    context: SweepContext, forward: Callable[..., Any], args: Any, kwargs: Any, *, routes: bool = False
) -> Any:
    total = context.num_rows
    if all(row_axis(tensor, total) is None for tensor in tensors_in((args, kwargs))):
        return forward(*args, **kwargs)

    def run(rows: slice) -> Any:
        return forward(*_rows_of(args, total, rows), **_rows_of(kwargs, total, rows))

    with gathering(run, context.row_blocks) if routes else nullcontext():
        outputs = [run(rows) for rows in context.row_blocks()]
    return _joined(outputs, context.active[0][1].num_rows)


def row_axis(tensor: torch.Tensor, total: int) -> int | None:
    """The axis of *tensor* that counts *total* rows; ``None``: it has none.

    A batch of one comes right before the rows: ``(1, rows, …)``, and ``(k, 1, rows, …)`` of what is there several times
    (positions in time, height and width; hidden states that are kept apart). Experts get ``(rows, …)``.
    """
    shape = tensor.shape
    if len(shape) >= 2 and shape[0] == 1 and shape[1] == total:
        return 1
    if len(shape) >= 3 and shape[1] == 1 and shape[2] == total:
        return 2
    return 0 if len(shape) >= 1 and shape[0] == total else None


def _rows_of(value: Any, total: int, rows: slice) -> Any:
    """*value* with every tensor that has all rows cut down to *rows*."""
    if isinstance(value, torch.Tensor):
        axis = row_axis(value, total)
        if axis is None:
            return value
        if axis == 1:
            return value[0, rows][None]  # not [:, rows], whose strides make products slow
        return value[rows] if axis == 0 else value[:, :, rows].contiguous()  # by its strides a product has other bits
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(item, total, rows) for item in value)
    if isinstance(value, dict):
        return {key: _rows_of(item, total, rows) for key, item in value.items()}
    return value


def _joined(outputs: list[Any], num_rows: int) -> Any:
    """The outputs of all row blocks, of which the first has *num_rows*, as one, tensor by tensor."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        axis = row_axis(first, num_rows) if first.dim() > 2 else 0
        return torch.cat(outputs, dim=axis or 0)
    if isinstance(first, tuple):
        return tuple(_joined([output[index] for output in outputs], num_rows) for index in range(len(first)))
    return first
