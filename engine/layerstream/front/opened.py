"""What every open engine has, whatever is asked of it: a model that is there, a thread that works, a way in.

| what | who ends it |
|---|---|
| ``_parts``: model, memory, store | the loop, as the last thing that its thread does |
| ``_loop``: the engine's thread | whoever closes the engine, or the collector, when nobody holds the engine |
| ``_intake``: makes requests of prompts; ``_guard``: whether passages are moved | nobody: they hold nothing |

An engine that cannot be opened leaves nothing open.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Any

from layerstream.api.events import Listener
from layerstream.api.home import Home
from layerstream.api.params import SamplingParams
from layerstream.api.request import Request
from layerstream.api.terms import Terms
from layerstream.hardware.threads import run_apart
from layerstream.intake import Intake
from layerstream.planner import Plan
from layerstream.runtime.guard import Guard, Shadows
from layerstream.runtime.loop import EngineLoop
from layerstream.runtime.reception import Outside
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.self_check import check_untested
from layerstream.text.prompt import Prompt


class Opened:
    """An engine that runs, and what it is."""

    def __init__(self, config: EngineConfig, listener: Listener | None) -> None:
        self._home = home = Home()
        with ExitStack() as undo:
            self._parts: Assembly = run_apart(lambda: _build(config, listener), Assembly.close)
            parts = self._parts
            undo.callback(parts.close)
            self._loop = EngineLoop(
                parts.steward,
                parts.step,
                parts.drafting,
                parts.weights,
                Outside(home, listener, config.max_queued, at_end=parts.close),
            )
            loop = self._loop
            undo.callback(loop.close)
            self._guard = Guard()
            self._intake = Intake(
                parts, loop.reception.cancel, lambda: parts.seconds_per_sweep(loop.counters), home, self._guard
            )
            if self.reuses_anywhere:
                loop.compare(Shadows(self._guard, self._intake.shadow_of))
            undo.pop_all()
        weakref.finalize(self, loop.close)

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._parts.config.model

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on beside prompt and parameters; caches of answers have it in their keys."""
        config = self._parts.config
        names = ("model", "revision", "dtype", "quantization", "max_context")
        said: dict[str, Any] = {"allow_control_tokens": True} if config.allow_control_tokens else {}
        if self.reuses_anywhere:
            said |= {"reuse": config.reuse, "recompute": config.recompute, "recompute_by": config.recompute_by}
        return {name: getattr(config, name) for name in names if getattr(config, name) is not None} | said

    @property
    def reuses_anywhere(self) -> bool:
        """Whether passages are moved to where they stand (``reuse="anywhere"``)."""
        return self._parts.config.reuse == "anywhere"

    def trust_reuse(self) -> None:
        """Move passages whatever comes of it, and compare no answers: where that is measured itself."""
        self._guard.is_acting = False

    @property
    def max_queued(self) -> int | None:
        """Answers that may wait for their turn; ``None``: any number."""
        return self._parts.config.max_queued

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together: the model's limit, or what the budget has KV pages for."""
        return self._parts.context_length

    @property
    def plan(self) -> Plan:
        """What is resident, what streams, and how the budget is spent; ``print`` it."""
        return self._parts.plan

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What ``None`` in :class:`SamplingParams` means for this model."""
        return self._parts.defaults.sampling

    @property
    def compute_seconds_per_token(self) -> float | None:
        """What computing a prompt's token took so far, reading left out; ``None`` before a prompt was computed."""
        step = self._parts.step
        return step.prefill_seconds / step.prefill_tokens if step.prefill_tokens else None

    def _submit(self, prompts: Seq[Prompt], params: SamplingParams, terms: Terms) -> list[Request]:
        """Make requests of *prompts* and hand them to the loop, to join the same sweep."""
        self._loop.reception.check_open()
        requests, answers = self._intake.take(prompts, params, terms)
        self._loop.submit(answers)
        return requests

    def _submit_if_idle(self, prompts: Seq[Prompt], params: SamplingParams, terms: Terms) -> list[Request] | None:
        """As ``_submit``; ``None``, and nothing is done: somebody asks."""
        self._loop.reception.check_open()
        requests, answers = self._intake.take(prompts, params, terms)
        return requests if self._loop.submit_if_idle(answers) else None


def _build(config: EngineConfig, listener: Listener | None) -> Assembly:
    if config.allow_untested:
        check_untested(config)
    return assemble(config, listener)
