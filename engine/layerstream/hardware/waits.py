"""Whether work for a device has the host wait for it: found out before it is recorded, which does not survive that."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerstream.hardware.nested import tensors_in

_DECIDES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NUMBERS = frozenset({"bool", "int", "float", "number"})
_COPIES = frozenset({"aten::to", "aten::_to_copy", "aten::copy_"})
_TAKES_INDICES = frozenset({"aten::index", "aten::index_put_", "aten::index_put"})  # which may be masks


class RefusingWaits(TorchDispatchMode):
    """Within, on this thread alone, an operator raises ``RuntimeError`` that tells the host what is in a tensor of
    *device*, makes a shape of it, or copies between the two."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func._schema.name, list(tensors_in((args, kwargs)))
        if self._is_there(given) and (_decides(func, name, given) or _crosses(name, given)):
            raise RuntimeError(f"{name} has the host wait for the device")
        found = func(*args, **kwargs)
        concerned = [*given, *tensors_in(found)]
        if self._is_there(concerned) and _crosses(name, concerned):
            raise RuntimeError(f"{name} has the host wait for the device")
        return found

    def _is_there(self, tensors: list[torch.Tensor]) -> bool:
        return any(tensor.device.type == self._kind for tensor in tensors)


def _decides(func: Any, name: str, given: list[torch.Tensor]) -> bool:
    if name in _TAKES_INDICES:
        return any(tensor.dtype in {torch.bool, torch.uint8} for tensor in given[1:])
    gives_numbers = any(str(found.type) in _NUMBERS for found in func._schema.returns)
    return gives_numbers or bool(_DECIDES & set(func.tags))


def _crosses(name: str, tensors: list[torch.Tensor]) -> bool:
    """Whether some are here and some there; single numbers go with a launch, unless it is them that are copied."""
    return len({tensor.device.type for tensor in tensors if tensor.dim() or name in _COPIES}) > 1
