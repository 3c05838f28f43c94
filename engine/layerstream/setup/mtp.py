"""The multi-token-prediction head of a model, put together from the same parts as the model that it is beside."""

from __future__ import annotations

import dataclasses

from layerstream.hardware.device import Placement
from layerstream.kv.pages import PagePool
from layerstream.model.linear import lent
from layerstream.model.model_weights import ModelWeights
from layerstream.model.runner import SweepRunner
from layerstream.runtime.mtp import MtpDrafter
from layerstream.scheduling.drafting.mirrors import Mirrors
from layerstream.setup.closing import Closing
from layerstream.setup.groundwork import Groundwork
from layerstream.setup.parts import load_weights, make_kv, make_runner, sweep_limits


def make_mtp(ground: Groundwork, runner: SweepRunner, weights: ModelWeights, closing: Closing) -> MtpDrafter | None:
    """What drafts by the head of the model that *runner* runs; ``None``: there is none, or the plan has no room for it.

    Args:
        weights: the model's, whose output projection the head has too, if all of it stays.
    """
    plan, head = ground.plan.mtp, ground.skeleton.mtp
    if plan is None or head is None:
        return None
    own = dataclasses.replace(
        ground,
        config=dataclasses.replace(ground.config, kv_store=None),
        plan=plan,
        skeleton=head,
        placement=None if ground.placement is None else Placement((ground.placement.first,), (0,)),
    )
    kv = make_kv(own, closing)
    own_weights = closing.keep(load_weights(own, None))
    projection = None if plan.facts.head.total_bytes else lent(weights.head)
    own_runner = make_runner(own, kv, own_weights, closing, runner.embedding, projection)
    own_runner.keeps_hidden = True
    if own_weights.streamer is not None:
        own_weights.streamer.read_ahead()
    mirrors = Mirrors(PagePool(plan.num_pages, plan.page_tokens))
    return MtpDrafter(own_runner, mirrors, sweep_limits(own))
