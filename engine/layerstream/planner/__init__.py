"""What fits where, and how fast, before anything is loaded: pure, sizes in, plans and forecasts out."""

from layerstream.planner.facts import ModelFacts
from layerstream.planner.plan import HostPlan, Plan
from layerstream.planner.spending import comfortable_bytes, make_plan

__all__ = ["HostPlan", "ModelFacts", "Plan", "comfortable_bytes", "make_plan"]
