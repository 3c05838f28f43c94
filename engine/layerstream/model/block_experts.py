"""The experts of a plan's blocks: which numbers they have in the bank, and how they become matrices."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from layerstream.core.sizes import PAGE
from layerstream.hardware.device import Device
from layerstream.hardware.reader import DirectReader
from layerstream.model.experts import Matrices as ExpertMatrices
from layerstream.model.matrices import Matrices, expert_parts
from layerstream.model.skeleton import Skeleton
from layerstream.planner.units import UnitPlan
from layerstream.streaming.experts.bank import Bank, ExpertBank, ExpertLost, Wish
from layerstream.streaming.experts.cache import ExpertCache
from layerstream.streaming.experts.device_bank import AnyBank, DeviceBank
from layerstream.streaming.experts.paths import ExpertPaths
from layerstream.streaming.layout import UnitLayout, lay_out

KNOWN_LAYOUTS = 16384  # of experts; some hundred bytes each


class BlockExperts:
    """The experts of one block; *first* is the number of the first of them in *bank*.

    Args:
        matrices: makes those that are computed with where everything else is; *on_host*: by the processor, beside it.
    """

    def __init__(self, bank: Bank, first: int, path: str, matrices: Matrices, on_host: Matrices | None = None) -> None:
        self._bank = bank
        self._first = first
        self._make = matrices.experts(path)
        self._make_on_host = self._make if on_host is None else on_host.experts(path)

    def divide(self, wish: Wish) -> frozenset[int]:
        """As :class:`~layerstream.model.experts.RoutedExperts` says."""
        return frozenset(number - self._first for number in self._bank.divide(self._numbered(wish)))

    def bring(
        self, wish: Wish, on_host: frozenset[int], may_skip: Callable[[], bool]
    ) -> Iterator[tuple[int, ExpertMatrices]]:
        """As :class:`~layerstream.model.experts.RoutedExperts` says."""
        numbers = frozenset(self._first + expert for expert in on_host)
        try:
            for number, stored, is_on_host in self._bank.bring(self._numbered(wish), numbers, may_skip):
                expert = number - self._first
                yield expert, (self._make_on_host if is_on_host else self._make)(expert, stored)
        except ExpertLost as lost:
            raise ExpertLost(lost.expert - self._first, lost.error) from lost.error

    def _numbered(self, wish: Wish) -> Wish:
        return Wish([self._first + expert for expert in wish.experts], wish.rows, wish.num_rows)


def install_experts(
    skeleton: Skeleton,
    plan: UnitPlan,
    matrices: Matrices,
    reader: DirectReader,
    shares: Sequence[float] = (),
    device: Device | None = None,
    host_fused_rows: Mapping[str, int] | None = None,
    computes: Callable[[str], bool] = lambda path: True,
) -> AnyBank:
    """A bank for the experts of *plan*, and the blocks that get them from it.

    Args:
        computes: whether the block of a path gets them from it.
        shares: how much each of them was used lately, as :meth:`ExpertCache.shares` says it.
        device: what computes; ``None``: the processor.
        host_fused_rows: beside a device, the processor may compute experts, with kernels for so many rows; ``None``: it
            may not.
    """
    nodes = [node for node in skeleton.routed if computes(node.name)]
    starts = list(accumulate((node.num_experts for node in nodes), initial=0))

    @lru_cache(maxsize=KNOWN_LAYOUTS)
    def layout(number: int) -> UnitLayout:
        place = bisect.bisect_right(starts, number) - 1
        path, expert = nodes[place].name, number - starts[place]
        keys = skeleton.expert_keys(path)
        parts = [part for key in keys for part in expert_parts(skeleton.sources[key], key, expert)]
        found = lay_out(f"{path}[{expert}]", parts, max_gap=PAGE)
        assert found.num_bytes <= plan.slot_bytes, f"{found.name} has {found.num_bytes} bytes for {plan.slot_bytes}"
        return found

    def cache(num_slots: int) -> ExpertCache:
        made = ExpertCache(min(num_slots, starts[-1]), starts[-1], sum(node.top_k for node in nodes))
        if len(shares) == starts[-1]:
            made.restore(shares)
        return made

    on_host: Matrices | None = None
    if device is None:
        bank = ExpertBank(layout, cache(plan.expert_slots), plan.slot_bytes, reader)
    else:
        behind = ExpertBank(layout, cache(plan.host_expert_slots), plan.slot_bytes, reader)
        if host_fused_rows is not None:
            on_host = Matrices(skeleton, host_fused_rows)
        bank = DeviceBank(
            layout,
            cache(plan.expert_slots),
            plan.slot_bytes,
            behind,
            device,
            ExpertPaths(max(node.expert_bytes for node in nodes)),
            computes_on_host=on_host is not None,
        )
    for node, first in zip(nodes, starts, strict=False):
        module = skeleton.model.get_submodule(node.name)
        module.routed = BlockExperts(bank, first, node.name, matrices, on_host)
    return bank
