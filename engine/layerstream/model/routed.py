"""The experts of a plan's blocks: which numbers they have in the bank, and how they become matrices."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from layerstream.errors import ReadError, TruncatedFile
from layerstream.model.experts import ExpertLost
from layerstream.model.experts import Matrices as ExpertMatrices
from layerstream.model.matrices import Matrices, expert_parts
from layerstream.model.skeleton import Skeleton
from layerstream.streaming.expert_bank import ExpertBank
from layerstream.streaming.expert_cache import ExpertCache
from layerstream.streaming.reader import DirectReader
from layerstream.streaming.residency import PAGE, UnitPlan
from layerstream.streaming.unit import UnitLayout, lay_out

KNOWN_LAYOUTS = 16384  # of experts; some hundred bytes each


class BlockExperts:
    """The experts of one block; *first* is the number of the first of them in *bank*."""

    def __init__(self, bank: ExpertBank, first: int, path: str, matrices: Matrices) -> None:
        self._bank = bank
        self._first = first
        self._make = matrices.experts(path)

    def bring(
        self, experts: list[int], shares: list[float], may_skip: Callable[[], bool]
    ) -> Iterator[tuple[int, ExpertMatrices]]:
        """As :class:`~layerstream.model.experts.RoutedExperts` says."""
        waiting = [self._first + expert for expert in experts]
        self._bank.want(waiting, shares)
        while waiting:
            number = self._bank.next(waiting, may_skip=may_skip())
            expert = number - self._first
            try:
                stored = self._bank.take(number)
            except (ReadError, TruncatedFile) as error:
                raise ExpertLost(expert, error) from error
            yield expert, self._make(expert, stored)
            self._bank.release(number)
            waiting.remove(number)


def install_experts(
    skeleton: Skeleton, plan: UnitPlan, matrices: Matrices, reader: DirectReader, shares: Sequence[float] = ()
) -> ExpertBank:
    """A bank for the experts of *plan*, and the blocks that get them from it.

    Args:
        shares: how much each of them was used lately, as :meth:`ExpertCache.shares` says it.
    """
    nodes = skeleton.routed
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

    chosen = sum(node.top_k for node in nodes)
    cache = ExpertCache(min(plan.expert_slots, starts[-1]), starts[-1], chosen)
    if len(shares) == starts[-1]:
        cache.restore(shares)
    bank = ExpertBank(layout, cache, plan.slot_bytes, reader)
    for node, first in zip(nodes, starts, strict=False):
        module = skeleton.model.get_submodule(node.name)
        module.routed = BlockExperts(bank, first, node.name, matrices)
    return bank
