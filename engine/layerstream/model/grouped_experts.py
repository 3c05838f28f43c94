"""Experts on an accelerator, all of a layer at once: rows are sorted by expert, and each projection is one call.

For layers whose experts are all there, where torch has a kernel for grouped products. It is used once it agreed there
with the plain product and gave a row the same bits alone as beside others. What a row's experts give is added in the
order in which its router chose them, so that nothing of a row depends on its neighbours. Rows of padding are routed to
nobody. Nothing waits for the device: whether the routers named experts that are there is asked when the sweep is over.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from layerstream.errors import InvalidRouting
from layerstream.model.routing import Call

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes; of the kernel's rows and of where they begin
TOLERANCE = 0.02  # of the largest value
LEAST_PIECE, MOST_PIECE = 32, 128  # rows at once: each comes as often as it has experts, and nobody planned for that
CAPABILITIES = (9, 10)  # of cards whose kernel runs all groups at once; torch asks the host about each on others

_agrees: dict[tuple[Any, ...], bool] = {}


@dataclass(frozen=True, slots=True)
class Routed:
    """The least and the largest number, ``()`` on the device, of the experts that the router of *name* named, of
    *num_experts*; -1 for padding."""

    least: torch.Tensor
    largest: torch.Tensor
    num_experts: int
    name: str


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether *device* multiplies in groups without asking the host."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    has_function = hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")
    return has_function and torch.cuda.get_device_capability(device)[0] in CAPABILITIES


def multiply(inputs: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """*inputs* ``(n, in)`` times *weights* ``(groups, in, out)``: ``(n, out)``, of which rows past the last of *ends*
    may be anything.

    Args:
        ends: ``(groups,)`` int32, the row that each group ends before.
    """
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    return function(inputs, weights, offs=ends)


def is_there(module: Any, call: Call) -> bool:
    """Whether all experts of *module* are there, and a kernel that could compute them for *call*."""
    hidden = call.hidden
    is_whole = not hidden.is_cpu and getattr(module, "routed", None) is None
    return is_whole and has_kernel(hidden.device, hidden.dtype)


def can_compute(module: Any, call: Call, names: Sequence[str]) -> bool:
    """Whether :func:`compute` gives what the experts *module*, with weights of *names*, give the rows of *call*; only
    where it :func:`is_there`. The first time for so many rows it waits for the device."""
    weights = [getattr(module, name) for name in names if not name.endswith("_bias")]
    return all(_multiplies(weight, call, is_transposed=module.is_transposed) for weight in weights)


def compute(module: Any, call: Call, names: Sequence[str]) -> tuple[torch.Tensor, Routed]:
    """What the experts give the rows of *call*, ``(rows, hidden)``, and what is to be checked with :func:`check`."""
    size = _piece(len(call.hidden))
    parts = zip(call.hidden.split(size), call.index.split(size), call.weights.split(size), strict=True)
    totals = [_compute(module, Call(hidden, index, weights, ()), names) for hidden, index, weights in parts]
    routed = Routed(*torch.aminmax(call.index), int(module.num_experts), type(module).__name__)
    return totals[0] if len(totals) == 1 else torch.cat(totals), routed


def _piece(num_rows: int) -> int:
    """Of *num_rows* those that are computed at once, so that all pieces are of one size; all, if there is no such."""
    return max((size for size in range(LEAST_PIECE, MOST_PIECE + 1) if num_rows % size == 0), default=num_rows)


def _compute(module: Any, call: Call, names: Sequence[str]) -> torch.Tensor:
    num_rows, top_k = call.index.shape
    num_experts = int(module.num_experts)
    flat = call.index.reshape(-1)
    experts, order = torch.sort(torch.remainder(flat, num_experts + 1), stable=True)  # padding comes last
    ends = torch.searchsorted(experts, _numbers(num_experts, flat.device), right=True, out_int32=True)
    places = experts.clamp(max=num_experts - 1) if module.has_bias else experts
    up, down = names[:2]

    def project(name: str, inputs: torch.Tensor) -> torch.Tensor:
        weight = getattr(module, name)
        found = multiply(inputs, weight if module.is_transposed else weight.transpose(1, 2), ends)
        return found + getattr(module, f"{name}_bias").index_select(0, places) if module.has_bias else found

    hidden = project(up, call.hidden.index_select(0, order // top_k))
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    output = project(down, hidden)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    by_choice = torch.empty_like(output).index_copy_(0, order, output).view(num_rows, top_k, -1)
    by_choice.masked_fill_((call.index < 0)[..., None], 0)
    return (by_choice * call.weights[..., None]).sum(1).to(call.hidden.dtype)


def check(routed: Sequence[Routed]) -> None:
    """Wait for the devices.

    Raises:
        InvalidRouting: a row was routed to an expert that is not there.
    """
    by_device: dict[torch.device, list[Routed]] = defaultdict(list)
    for one in routed:
        by_device[one.largest.device].append(one)
    for some in by_device.values():
        found = torch.stack([extreme for one in some for extreme in (one.least, one.largest)]).view(-1, 2).tolist()
        for one, (least, largest) in zip(some, found, strict=True):
            if least < -1 or largest >= one.num_experts:
                raise InvalidRouting(
                    f"the router of {one.name} sends a row to expert {least if least < -1 else largest}, and there are "
                    f"{one.num_experts}: its weights are damaged, or of another model; fetch the files again"
                )


@cache
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


def _multiplies(weight: Any, call: Call, *, is_transposed: bool) -> bool:
    """Whether the kernel multiplies by *weight* ``(experts, …)``, for as many rows as *call* has or about so many."""
    if not isinstance(weight, torch.Tensor) or weight.dtype != call.hidden.dtype:
        return False
    strides = weight.shape[1] * weight.element_size(), weight.shape[2] * weight.element_size()
    if weight.data_ptr() % ALIGNMENT or any(stride % ALIGNMENT for stride in strides):
        return False
    num_rows = _piece(len(call.hidden)) * call.index.shape[1]
    kind = weight.device, weight.dtype, weight.shape, is_transposed, num_rows.bit_length()
    if kind not in _agrees:
        _agrees[kind] = _probe(weight if is_transposed else weight.transpose(1, 2), num_rows)
    return _agrees[kind]


def _probe(weights: torch.Tensor, num_rows: int) -> bool:
    """Whether *num_rows* of inputs, divided unevenly and all of one expert, come close to plain products, and a row of
    each expert has the same bits where it is the expert's only one."""
    num_experts, width, _ = weights.shape
    drawn = torch.randn((num_rows, width), generator=torch.Generator().manual_seed(0))
    inputs = drawn.to(weights.device, weights.dtype)
    try:
        return all(
            _agrees_for(weights, inputs, sizes)
            for sizes in (
                _uneven(num_rows, num_experts),
                [num_rows] + [0] * (num_experts - 1),
                [0] * (num_experts - 1) + [num_rows],
            )
        )
    except torch.OutOfMemoryError:  # another time there may be enough
        raise
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("grouped products are not used on %s: %s", weights.device, error)
        return False


def _uneven(num_rows: int, num_experts: int) -> list[int]:
    """Sizes of groups that add up to no more than *num_rows*: 1, 2, 4, 8 … by turns with none."""
    sizes = [0] * num_experts
    left, size = num_rows, 1
    for expert in range(0, num_experts, 2):
        sizes[expert] = min(size, left)
        left -= sizes[expert]
        size *= 2
    return sizes


def _agrees_for(weights: torch.Tensor, inputs: torch.Tensor, sizes: list[int]) -> bool:
    device = weights.device
    ends = torch.tensor(sizes).cumsum(0)
    wanted = [expert for expert, size in enumerate(sizes) if size]
    lasts = [int(ends[expert]) - 1 for expert in wanted]
    found = multiply(inputs, weights, ends.to(device, torch.int32))[lasts]
    alone = inputs.flip(0)
    alone[: len(lasts)] = inputs[lasts]
    ones = torch.tensor([int(size > 0) for size in sizes]).cumsum(0)
    again = multiply(alone, weights, ones.to(device, torch.int32))[: len(lasts)]
    expected = torch.stack([inputs[last] @ weights[expert] for last, expert in zip(lasts, wanted, strict=True)])
    difference = (found.float() - expected.float()).abs().max()
    return torch.equal(found, again) and bool(difference <= TOLERANCE * expected.float().abs().max())
