"""What routing costs: how many experts a sweep wants, and how many of them are there. Pure.

With routers that send every row to *k* of *E* experts independently, *n* rows want ``E (1 - (1 - k/E)^n)`` of them. Of
those wanted, the share that is there is the share of all uses that fall on the experts that stay; nobody knows it
before the model has run, and then it is remembered (:mod:`layerstream.model.expert_usage`). Until then uses are taken
to be spread evenly, which is the worst that there is.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerstream.planner.units import ExpertsNode

HOST_ROWS = 256  # of a layer that the processor computes experts for, where the sweep itself has no more


def num_wanted(node: ExpertsNode, num_rows: float) -> float:
    """Experts of one block that *num_rows* are routed to, on average."""
    return node.num_experts * (1.0 - (1.0 - min(1.0, node.top_k / node.num_experts)) ** num_rows)


def hit_rate(num_slots: int, num_experts: int, shares: Sequence[float] = ()) -> float:
    """Of the experts that are wanted, the share that is there, if *num_slots* keep those that are used most.

    Args:
        shares: how much each of them is used, but for a factor; nothing: all of them as often.
    """
    if num_slots >= num_experts:
        return 1.0
    if len(shares) != num_experts or not sum(shares):
        return num_slots / num_experts
    return sum(sorted(shares, reverse=True)[:num_slots]) / sum(shares)


def read_bytes(nodes: Sequence[ExpertsNode], num_rows: float, rate: float) -> float:
    """Experts that a sweep of *num_rows* reads on average, where the share *rate* of those wanted is there."""
    return sum(num_wanted(node, num_rows) * node.expert_bytes for node in nodes) * (1.0 - rate)
