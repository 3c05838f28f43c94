"""Counts what would be launched on a device: operators that are no views and make no empty memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")


class Launches(TorchDispatchMode):
    """While it is entered; on a pretended device it sees what is inside of tensors.

    Attributes:
        by_name: how often each operator was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        aliases = [part.alias_info for part in func._schema.returns if part.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases) and _storages(found) <= _storages(args)
        if not is_view and not str(func).startswith(_NOTHING):
            self.by_name[str(func)] += 1
        return found


def _storages(values: Any) -> set[int]:
    """Of the tensors that *values* are, or has."""
    tensors = values if isinstance(values, tuple | list) else (values,)
    return {value.untyped_storage().data_ptr() for value in tensors if isinstance(value, torch.Tensor)}
