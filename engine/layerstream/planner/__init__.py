"""What fits where, and how fast, before anything is loaded: pure, sizes in, plans and forecasts out."""

from layerstream.planner.facts import ModelFacts
from layerstream.planner.on_host import comfortable_bytes, make_plan
from layerstream.planner.plan import HostPlan, Plan

__all__ = ["HostPlan", "ModelFacts", "Plan", "comfortable_bytes", "make_plan"]
