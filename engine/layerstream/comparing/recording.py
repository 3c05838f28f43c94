"""What modules were given and what they gave, by the position of each token, on disk and not in memory.

The engine computes a prompt in chunks over several sweeps, whole or one row block at a time, with padding; plain
transformers computes all rows at once. So every row is filed under the position of its token, and the two can be laid
side by side. Modules whose tensors have no row for each token (expanded latents) are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from layerstream.model.context import current
from layerstream.model.hooks import row_axis

Rows: TypeAlias = Sequence[tuple[int, int, int]]
"""``(row, start, stop)``: from *row* on there are the tokens ``[start, stop)``."""


class Record:
    """Tensors ``(tokens, width)`` by name, each in a file of *folder*, which is made."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._num_tokens = num_tokens
        self._tensors: dict[str, torch.Tensor] = {}
        self._seen: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensors: Sequence[torch.Tensor], total: int, rows: Rows) -> None:
        """File the *rows* of *tensors*, side by side; of those that have *total* rows."""
        parts = [found for tensor in tensors if (found := by_rows(tensor, total)) is not None]
        if not parts:
            return
        found = torch.cat(parts, 1)
        if name not in self._tensors:
            self._seen[name] = torch.zeros(self._num_tokens, dtype=torch.bool)
            self._tensors[name] = self._make(found.shape[1], found.dtype)
        target = self._tensors[name]
        if target.shape[1] != found.shape[1]:  # no rows after all
            self._seen[name].zero_()
            return
        for row, start, stop in rows:
            target[start:stop] = found[row : row + stop - start].cpu()
            self._seen[name][start:stop] = True

    def get(self, name: str) -> torch.Tensor | None:
        """``(tokens, width)``; ``None``: it is not there for every token."""
        return self._tensors[name] if name in self._seen and bool(self._seen[name].all()) else None

    def _make(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        path = self._folder / str(len(self._tensors))
        flat = torch.from_file(str(path), shared=True, size=self._num_tokens * width, dtype=dtype)
        return flat.view(self._num_tokens, width)


def by_rows(tensor: torch.Tensor, total: int) -> torch.Tensor | None:
    """``(total, width)`` of ``(1, total, …)`` or ``(total, …)``; ``None``: it is neither."""
    axis = row_axis(tensor, total)
    return None if axis is None else (tensor[0] if axis else tensor).reshape(total, -1)


def in_hand() -> tuple[int, Rows]:
    """The rows that the engine has in hand, for :meth:`Record.put`."""
    context = current()
    return context.num_rows, [(row, span.start, span.stop) for row, span in context.spans()]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a module computes on: the first tensor of numbers."""
    return next(iter(gave((*args, *kwargs.values()))), None)


def gave(output: Any) -> list[torch.Tensor]:
    """What it makes of that: the first tensor of numbers, and what routers give beside it: the weights of experts.
    (Attention's weights, of more dimensions, are there in plain transformers alone.)"""
    values = output if isinstance(output, tuple | list) else (output,)
    numbers = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return numbers[:1] + [value for value in numbers[1:] if value.dim() <= 2]


class Taps:
    """Hooks on the modules of one model that file what passes in *record*.

    Args:
        rows: which rows are in hand.
    """

    def __init__(self, model: torch.nn.Module, record: Record, rows: Callable[[], tuple[int, Rows]] = in_hand) -> None:
        self._model = model
        self._record = record
        self._rows = rows
        self._handles: list[Any] = []
        self.returned: list[str] = []

    def on_input(self, path: str) -> None:
        """File what the module *path* is given as ``path:in``."""

        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = given(args, kwargs)
            self._file(f"{path}:in", [] if hidden is None else [hidden])

        module = self._model.get_submodule(path)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, path: str) -> None:
        """File what it gives as ``path:out``, and note in ``returned`` that it has."""

        def hook(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if path not in self.returned:
                self.returned.append(path)
            self._file(f"{path}:out", gave(output))

        self._handles.append(self._model.get_submodule(path).register_forward_hook(hook))

    def on_routes(self, path: str) -> None:
        """File which experts the rows of the module *path* are sent to, and with which weights, as ``path:experts`` and
        ``path:weights``."""

        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, index, weights = (*args, *kwargs.values())[:3]
            self._file(f"{path}:experts", [index])
            self._file(f"{path}:weights", [weights])

        module = self._model.get_submodule(path)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _file(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self._record.put(name, tensors, *self._rows())

    @contextmanager
    def open(self) -> Iterator[Taps]:
        """Within it they are there; closes them."""
        try:
            yield self
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
