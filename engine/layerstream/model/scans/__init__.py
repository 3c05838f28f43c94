"""Scans: what recurrent layers compute along a sequence, from the state before its rows to the state after them.

transformers' modules call a function for each (a convolution, a gated delta rule, a selective scan), over whole
sequences of a batch. Here the rows of a packed row block belong to several sequences, and each goes on from a state of
its own. So the functions that a module calls are bound to :class:`Call` objects, which are cut by rows and run span by
span (:mod:`layerstream.model.recurrence`).

A *scan* is a row of :data:`SCANS`: the name of a transformers' function, and what makes a :class:`Call` of its
arguments. The functions for whole chunks and for single steps of one recurrence make the same calls. Pure: tensors in,
tensors out; nobody here knows of sweeps, slots or sequences.

Invariants: a row's output depends on its own span alone, its shape included (a chunk of *n* rows; or one row); the
state after a span depends on the state before it and on the span alone, so that chunks computed in one sweep or in
several, by this process or another, leave the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from layerstream.kv.shape import StatePart
from layerstream.model.scans import fused
from layerstream.model.scans.convolution import convolution
from layerstream.model.scans.delta_rule import channel_decay, head_decay
from layerstream.model.scans.selective_scan import selective_scan
from layerstream.model.scans.state_space import state_space

VERSION = 1  # of the formulas: another one may give other bits


class Call(Protocol):
    """The arguments of one call of a transformers' function, as far as they concern some rows (a batch of one)."""

    @property
    def part(self) -> StatePart:
        """The state that it goes on from and leaves; its name is ``"conv"`` or ``"recurrent"``."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that it has."""
        ...

    def cut(self, rows: slice | torch.Tensor) -> Call:
        """Of *rows* alone: views of a slice, copies of those that a tensor names."""
        ...

    def kept(self) -> Call:
        """A copy that holds nothing of the weights' memory, for :meth:`step` later."""
        ...

    def chunk(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """The function's output for its rows as a chunk of a prompt.

        Args:
            state: before the rows, of ``part``'s shape; ``None``: nothing came before. It is left as it is.
            left: where the state after the rows goes; it may be *state* itself.
        """
        ...

    def step(self, state: torch.Tensor | None, left: torch.Tensor) -> torch.Tensor:
        """The same for one row that is generated or guessed. Its bits are those of any other such row."""
        ...

    def steps(self, states: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The same for several such rows at once, each of a sequence of its own: *states* ``(rows, *part.shape)`` and
        as many *left*. A row's bits are its own among as many others, whoever they are."""
        ...

    def joined(self, outputs: list[torch.Tensor], rows: list[slice | torch.Tensor]) -> Any:
        """What the function returns for all its rows: *outputs* at *rows*, zeros elsewhere (padding). An output may
        have more rows than places: those are nobody's. Where it returns a state, too, that is an empty tensor."""
        ...


SCANS: dict[str, Callable[..., Call]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": head_decay,
    "torch_recurrent_gated_delta_rule": head_decay,
    "chunk_kimi_delta_attention": channel_decay,
    "recurrent_kimi_delta_attention": channel_decay,
    "mamba2_chunk_scan": state_space,
    "mamba_selective_scan": selective_scan,
}


def identity() -> str:
    """What computes the scans, for whoever keeps states: others' may differ in the last bits."""
    kernels = fused.version()
    return f"torch {VERSION}" + (f", flash-linear-attention {kernels}" if kernels else "")
