"""A graph of the pretended device: a tape of operators, played again on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from layerstream.hardware.nested import tensors_in
from layerstream.model import elementwise

_WAITS = frozenset(
    "copy_across item tolist numpy __bool__ __int__ __float__ __index__ __contains__ equal allclose is_nonzero nonzero "
    "masked_select unique".split()
)


class Tape:
    """What was done on pretended tensors: functions, what they were given, and what they made."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def note(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """*func* gave *found*; views lie where they lay, and are not made again."""
        given, gave = list(tensors_in((args, kwargs))), list(tensors_in(found))
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        made = [tensor for tensor in gave if tensor.untyped_storage()._cdata not in storages]
        if made or not gave or _writes(func, kwargs):
            self._done.append((func, args, kwargs, made))

    def replay(self) -> None:
        """Do it again."""
        for func, args, kwargs, made in self._done:
            with elementwise.steady():
                found = func(*args, **kwargs)
            for old, new in zip(made, tensors_in(found) if made else (), strict=True):
                assert old.shape == new.shape, f"{func} made another shape"
                old.copy_(new)


def _writes(func: Any, kwargs: Any) -> bool:
    name = getattr(func, "__name__", "")
    is_named_so = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return is_named_so or "out" in kwargs or bool(kwargs.get("inplace"))


def refuse_waits(name: str, args: Any) -> None:
    """As a stream does that is captured."""
    flags = [tensor for tensor in tensors_in(args[1:]) if tensor.dtype == torch.bool]
    if name in _WAITS or (name == "__getitem__" and flags):
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
