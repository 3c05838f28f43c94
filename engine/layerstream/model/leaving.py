"""Rows that leave a sweep in the middle of the model: of a blended prompt, what need not be computed again.

After the layer in which keys are compared (:mod:`layerstream.model.blending`), the rows that stay are gathered into row
blocks of the same shapes, and so is whatever all layers are given alike (angles, positions). After the last layer they
go back to the rows that they were, so that nothing behind the layers knows of it.

Invariant: ``SweepContext.active`` describes the rows of the tensors in hand, before, between and after.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch

from layerstream.core.leaving import Stays, blocks_without
from layerstream.model.context import SweepContext, current
from layerstream.model.hooks import row_axis


def let_rows_leave(layers: Seq[torch.nn.Module], after: int) -> None:
    """Have rows leave after layer *after* of *layers*, and come back after the last one, where a sweep says so."""
    for number, layer in enumerate(layers[after + 1 :], start=after + 1):
        layer.forward = _with_fewer(layer.forward, is_last=number == len(layers) - 1)


def _with_fewer(forward: Callable[..., Any], *, is_last: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        context = current()
        if context.blend is None or not context.blend.leaves:
            return forward(*args, **kwargs)
        fewer = context.fewer
        if fewer is None:
            fewer = context.fewer = Fewer(context, context.blend.stays())
        output = forward(*fewer.cut(args), **fewer.cut(kwargs))
        return fewer.end(context, output) if is_last else output

    return run


class Fewer:
    """The rows that stay of a sweep."""

    def __init__(self, context: SweepContext, stays: Stays) -> None:
        self._before = context.active
        self._total = context.num_rows
        blocks, rows = blocks_without([block for _, block in self._before], stays)
        self._rows = torch.tensor(rows)
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if len(rows) < self._total:
            context.active = []
            at = 0
            for block in blocks:
                context.active.append((at, block))
                at += block.num_rows

    def cut(self, value: Any) -> Any:
        """*value* with the rows that stay, wherever it has all of them."""
        if len(self._rows) == self._total:
            return value
        if isinstance(value, torch.Tensor):
            return self._cut(value)
        if isinstance(value, tuple | list):
            return type(value)(self.cut(item) for item in value)
        if isinstance(value, dict):
            return {key: self.cut(item) for key, item in value.items()}
        return value

    def end(self, context: SweepContext, output: Any) -> Any:
        """The last layer is over: *output* with all rows, nothing in those that left."""
        context.active = self._before
        if len(self._rows) == self._total:
            return output
        if isinstance(output, torch.Tensor):
            axis = row_axis(output, len(self._rows))
            if axis is None:
                return output
            shape = list(output.shape)
            shape[axis] = self._total
            return output.new_zeros(shape).index_copy_(axis, self._rows.to(output.device), output)
        if isinstance(output, tuple):
            return tuple(self.end(context, item) for item in output)
        return output

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        axis = row_axis(tensor, self._total)
        if axis is None:
            return tensor
        if id(tensor) not in self._known:  # kept beside what came of it, so that no other gets its id
            self._known[id(tensor)] = tensor, tensor.index_select(axis, self._rows.to(tensor.device))
        return self._known[id(tensor)][1]
