"""Mixtures of experts: each routed expert computes its rows in row blocks of fixed size.

Registered as the experts implementation ``"layerstream"`` of transformers' ``ExpertsInterface``. How many rows an
expert gets depends on the whole sweep; padding them to a constant keeps a row's bits free of its neighbours. Rows of
padding are routed to nobody. A row's experts are added in the order of their numbers, whichever of them was there
first.

Where experts come as they are routed to, what all row blocks of a sweep want is gathered first
(:mod:`layerstream.model.routing`). Where an accelerator has them all, they are computed at once
(:mod:`layerstream.model.grouped_experts`).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeAlias

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from layerstream.checkpoint.codecs.base import Codec, Planes
from layerstream.checkpoint.names import PackedSource
from layerstream.core.sweep import SweepFailed
from layerstream.errors import InvalidRouting
from layerstream.model import elementwise, grouped_experts
from layerstream.model.context import current
from layerstream.model.routing import Call
from layerstream.streaming.experts.bank import ExpertLost, Wish

IMPLEMENTATION = "layerstream"
EARLY_ROWS = 64  # that may be computed before their turn, however few rows there are
EXPERT_ROWS = 16  # rows per expert and call


@dataclass(frozen=True, slots=True)
class FusedMatrix:
    """A quantised matrix of *num_rows*, that a kernel multiplies by as it is stored."""

    codec: Codec
    planes: Planes
    num_rows: int

    def product(self, inputs: torch.Tensor, num_used: int) -> torch.Tensor:
        """*inputs* ``(rows, columns)`` times its transpose; rows from *num_used* on are zeros."""
        outputs = inputs.new_zeros((len(inputs), self.num_rows))
        outputs[:num_used] = self.codec.product(self.planes, inputs[:num_used])[:, : self.num_rows]
        return outputs


Matrices: TypeAlias = Mapping[str, torch.Tensor | FusedMatrix]
"""An expert's weights by the names that the module has for those of all experts."""


class RoutedExperts(Protocol):
    """The experts of one block, which come as they are routed to."""

    def divide(self, wish: Wish) -> frozenset[int]:
        """Which of them the processor is to compute, beside an accelerator."""
        ...

    def bring(
        self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]
    ) -> Iterator[tuple[int, Matrices]]:
        """Each of the experts once, with weights that are valid until the next is asked for.

        Args:
            on_host: what :meth:`divide` said.
            may_skip: asked before each of them; whether another than the first of those left may come.

        Raises:
            ExpertLost: one of them could not be read.
        """
        ...


class PackedExperts:
    """Quantised matrices of experts in the place of a parameter ``(experts, …)``: ``[expert]`` is one of them, decoded
    or for a kernel.

    Args:
        scratch: ``(rows, columns)`` of one expert; overwritten when another one is asked for.
        is_fused: whether the codec's kernel multiplies by them.
    """

    def __init__(self, source: PackedSource, planes: Planes, scratch: torch.Tensor, *, is_fused: bool) -> None:
        self._source = source
        self._planes = planes
        self._scratch = scratch
        self._is_fused = is_fused
        self._present: int | None = None

    def __getitem__(self, expert: int) -> torch.Tensor | FusedMatrix:
        rows, codec = self._scratch.shape[0], self._source.codec
        first = expert * rows
        if self._is_fused or self._present != expert:
            planes = codec.cut(self._planes, self._source.matrix_shape[0], first, first + rows)
            if self._is_fused:
                return FusedMatrix(codec, planes, rows)
            codec.decode(planes, first, self._scratch)
            self._present = expert
        return self._scratch.T if codec.transposes else self._scratch


def register() -> None:
    """Make ``experts_implementation="layerstream"`` known to transformers. Idempotent."""
    ExpertsInterface.register(IMPLEMENTATION, compute_experts)


def compute_experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum over each row's routed experts.

    Args:
        module: a fused experts module (``gate_up_proj`` or ``up_proj``, and ``down_proj``, all ``(experts, …)``).
        hidden_states: ``(rows, hidden)``.
        top_k_index, top_k_weights: ``(rows, k)``.

    Returns:
        ``(rows, hidden)``.

    Raises:
        InvalidRouting: a row is routed to an expert that is not there.
    """
    context = current()
    if context.is_single_block and (num_padding := context.num_padding):
        top_k_index = top_k_index.clone()
        top_k_index[-num_padding:] = -1
    call = Call(hidden_states, top_k_index, top_k_weights, tuple(context.spans()))
    if grouped_experts.is_there(module, call) and grouped_experts.can_compute(module, call, weight_names(module)):
        total, routed = grouped_experts.compute(module, call, weight_names(module))
        context.routed.append(routed)
        return total
    answer = functools.partial(_answer, module)
    return answer([call])[0] if context.routing is None else context.routing.ask(call, answer)


def _answer(module: torch.nn.Module, calls: Sequence[Call]) -> list[torch.Tensor]:
    """What the experts give the rows of all *calls*."""
    if len(calls) == 1:
        return [_compute(module, calls[0])]
    sizes = [len(call.hidden) for call in calls]
    starts = accumulate(sizes, initial=0)
    together = Call(
        torch.cat([call.hidden for call in calls]),
        torch.cat([call.index for call in calls]),
        torch.cat([call.weights for call in calls]),
        tuple((start + at, span) for start, call in zip(starts, calls, strict=False) for at, span in call.spans),
    )
    return list(_compute(module, together).split(sizes))


def _rows_per_call(module: torch.nn.Module, num_rows: int) -> int:
    """Of an expert, for *num_rows* in hand.

    A row block of one row that is computed alone whatever the sweep holds is called as one row: where everything is
    there, all are. Where experts come as they are routed to, the rows in hand are those of one row block or of all, so
    that their number says nothing of a row.
    """
    return 1 if num_rows == 1 and getattr(module, "routed", None) is None else EXPERT_ROWS


def _compute(module: torch.nn.Module, call: Call) -> torch.Tensor:
    """Each expert's rows in calls of a constant size; added up in the order of the experts' numbers.

    Raises:
        SweepFailed: an expert could not be read, and these sequences have rows that are routed to it.
    """
    routes = _Routes(call.index, int(module.num_experts), type(module).__name__)  # type: ignore[arg-type]
    try:
        return _sum(module, call, routes, _rows_per_call(module, len(call.hidden)))
    except ExpertLost as lost:
        rows = routes.of(lost.expert)[0].tolist()
        owners = {span.sequence for at, span in call.spans for row in rows if at <= row < at + len(span)}
        raise SweepFailed(frozenset(owners), lost.error) from lost.error


def _sum(module: torch.nn.Module, call: Call, routes: _Routes, rows_per_call: int) -> torch.Tensor:
    wish = routes.wish
    routed: RoutedExperts | None = getattr(module, "routed", None)
    on_host = frozenset[int]() if routed is None or module.has_post_expert_norm else routed.divide(wish)
    on_host_inputs = _inputs_on_host(call, routes, sorted(on_host))
    total = _Sum(call, routes)
    brought = _all_there(module, wish.experts) if routed is None else routed.bring(wish, on_host, total.has_room)
    for expert, matrices in brought:
        total.add_up(with_host=not total.has_room())  # not before: what the processor takes for an expert is timed
        if expert in on_host:
            parts = iter(on_host_inputs[expert].split(rows_per_call))
        else:
            parts = (call.hidden[rows] for rows in routes.of(expert)[0].split(rows_per_call))
        outputs = []
        for part in parts:
            padded = part.new_zeros((rows_per_call, part.shape[1]))
            padded[: len(part)] = part
            outputs.append(_run_expert(module, matrices, padded, len(part))[: len(part)])
        total.add(expert, torch.cat(outputs), is_on_host=expert in on_host)
    return total.finish()


def _inputs_on_host(call: Call, routes: _Routes, experts: list[int]) -> dict[int, torch.Tensor]:
    """What *experts* get, in host memory: fetched at once, before the device has anything else to do."""
    if not experts:
        return {}
    rows = [routes.of(expert)[0] for expert in experts]
    fetched = call.hidden[torch.cat(rows)].cpu()
    return dict(zip(experts, fetched.split([len(some) for some in rows]), strict=True))


class _Sum:
    """Adds up what experts give, in the order of their numbers, whichever of them was there first.

    What the processor computed goes to the device when all is queued there, or when it takes too much room: the copy
    waits for what was queued before.
    """

    def __init__(self, call: Call, routes: _Routes) -> None:
        self._call = call
        self._routes = routes
        self._total = torch.zeros_like(call.hidden)
        self._left = deque(routes.wish.experts)
        self._early: dict[int, torch.Tensor] = {}  # computed before their turn
        self._on_host: set[int] = set()

    def has_room(self) -> bool:
        """Whether what was computed early takes no more than all rows take once, or a few."""
        return sum(map(len, self._early.values())) < max(EARLY_ROWS, len(self._call.hidden))

    def add(self, expert: int, outputs: torch.Tensor, *, is_on_host: bool) -> None:
        """*outputs* ``(rows, hidden)`` of the rows of *expert*."""
        self._early[expert] = outputs
        if is_on_host:
            self._on_host.add(expert)
        else:
            self.add_up(with_host=False)

    def finish(self) -> torch.Tensor:
        """The sum ``(rows, hidden)``, when all were added."""
        self.add_up(with_host=True)
        return self._total

    def add_up(self, *, with_host: bool) -> None:
        """Add those whose turn has come; *with_host*: also those that have to cross, for which the device is waited."""
        while self._left and (expert := self._left[0]) in self._early:
            if expert in self._on_host and not with_host:
                return
            rows, slots = self._routes.of(self._left.popleft())
            outputs = self._early.pop(expert).to(self._total.device)
            weights = self._call.weights[rows, slots, None]
            self._total.index_add_(0, rows, (outputs * weights).to(self._total.dtype))


class _Routes:
    """Which rows are routed to which experts.

    Raises:
        InvalidRouting: one of them is not there.
    """

    def __init__(self, index: torch.Tensor, num_experts: int, name: str) -> None:
        self._top_k = index.shape[1]
        flat = index.reshape(-1)
        is_nobody = (flat < -1) | (flat >= num_experts)
        counts = torch.bincount(flat.masked_fill(is_nobody, num_experts) + 1, minlength=num_experts + 2).tolist()
        if counts.pop():
            raise InvalidRouting(
                f"the router of {name} sends a row to expert {int(flat[is_nobody][0])}, and there are {num_experts}: "
                "its weights are damaged, or of another model; fetch the files again"
            )
        order = torch.argsort(flat, stable=True)
        self._rows, self._slots = order // self._top_k, order % self._top_k
        start = counts[0]  # rows of padding
        self._ranges: dict[int, tuple[int, int]] = {}
        for expert, count in enumerate(counts[1:]):
            if count:
                self._ranges[expert] = start, start + count
                start += count

    @property
    def wish(self) -> Wish:
        """How many rows are routed to each of those that any row is routed to."""
        rows = [stop - start for start, stop in self._ranges.values()]
        return Wish(list(self._ranges), rows, sum(rows) / self._top_k)

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are routed to *expert*, ascending, and which of their choices it is."""
        start, stop = self._ranges[expert]
        return self._rows[start:stop], self._slots[start:stop]


def weight_names(module: torch.nn.Module) -> list[str]:
    """Of the parameters that *module* has for all experts."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return [*names, *(f"{name}_bias" for name in names)] if module.has_bias else names


def turn(module: Any) -> None:
    """Have *module*, on the meta device, take its matrices with rows and columns exchanged."""
    for name in weight_names(module):
        turned = module.get_parameter(name).transpose(1, 2).contiguous()
        module.register_parameter(name, torch.nn.Parameter(turned, requires_grad=False))
    module.is_transposed = not module.is_transposed


def _all_there(module: torch.nn.Module, experts: list[int]) -> Iterator[tuple[int, Matrices]]:
    names = weight_names(module)
    for expert in experts:
        yield expert, {name: getattr(module, name)[expert] for name in names}


def _run_expert(module: torch.nn.Module, matrices: Matrices, inputs: torch.Tensor, num_used: int) -> torch.Tensor:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _project(module, up_name, matrices, inputs, num_used)
    with elementwise.steady():
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)  # type: ignore[operator]
    output = _project(module, "down_proj", matrices, hidden, num_used)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)  # type: ignore[operator]
    return output


def _project(
    module: torch.nn.Module, name: str, matrices: Matrices, inputs: torch.Tensor, num_used: int
) -> torch.Tensor:
    weight, bias = matrices[name], matrices.get(f"{name}_bias")
    assert bias is None or isinstance(bias, torch.Tensor)
    if isinstance(weight, FusedMatrix):
        product = weight.product(inputs, num_used)
        return product if bias is None else product + bias
    return F.linear(inputs, weight.T if module.is_transposed else weight, bias)
