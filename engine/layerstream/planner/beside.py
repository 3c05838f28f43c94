"""A multi-token-prediction head beside its model: what of the memory it gets. Pure.

The head is a model of one layer with KV of its own, and it shares the model's output projection where that stays in
memory. What it takes comes out of the model's budget, so a plan with it is made only where it does not cost more than
it may bring: a model that stays in memory without it stays there, and none is refused because of it. The hidden states
that it is given lie where the model's activations were: it computes between two sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from layerstream.errors import BudgetTooSmall
from layerstream.planner.facts import ModelFacts
from layerstream.planner.plan import Plan
from layerstream.planner.units import WeightNode

SHARE_OF_MEMORY = 0.15  # at most, for a head, its KV and what it computes with
SWEEP_TOKENS = 128  # of a prompt at a time

Spend = Callable[[ModelFacts, Plan | None], Plan]
"""The plan for a model, beside that of its head; ``None``: it has the memory to itself."""


def plan_with_head(facts: ModelFacts, spend: Spend, spend_on_head: Callable[[ModelFacts], Plan]) -> Plan:
    """The plan for a model of *facts*, with its head where there is one and it has room.

    Args:
        spend_on_head: the plan for the head, within its share.

    Raises:
        BudgetTooSmall: there is no room for the model without the head.
    """
    alone = spend(facts, None)
    if facts.mtp is None:
        return alone
    for shares in (True, False) if head_stays(alone) else (False,):
        try:
            head = spend_on_head(_beside(facts.mtp, alone, shares=shares))
            plan = spend(facts, head)
        except BudgetTooSmall:
            continue
        if plan.streams == alone.streams and (head_stays(plan) or not shares):
            return replace(plan, mtp=head)
    return alone


def head_stays(plan: Plan) -> bool:
    """Whether all of the output projection stays where it is computed with."""
    count = len(plan.weights.units)
    return plan.weights.residents >= frozenset(range(len(plan.weights.body), count))


def _beside(mtp: ModelFacts, plan: Plan, *, shares: bool) -> ModelFacts:
    """What the plan for the head depends on beside *plan*: it keeps KV of as many tokens, looks embeddings up where
    the model does, and multiplies by the model's output projection if it *shares* that."""
    return replace(
        mtp,
        head=WeightNode(mtp.head.name) if shares else mtp.head,
        embedding_bytes=0,
        kv_tokens=plan.num_pages * plan.page_tokens,
        sweep_tokens=min(SWEEP_TOKENS, plan.max_sweep_tokens),
    )
