"""``layerstream plan``: what would fit where, and how fast it would be, before a weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.cli.failures import in_shell_words
from layerstream.cli.options import EngineOptions, with_options
from layerstream.cli.report import format_seconds, format_streamed
from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from layerstream.model.skeleton import Skeleton
    from layerstream.planner import ModelFacts, Plan
    from layerstream.planner.advice import Advice
    from layerstream.planner.forecast import Forecast
    from layerstream.setup.config import EngineConfig


PROMPT_TOKENS = 1000
EXPERT_CURVE = (1.5, 2.0, 3.0)  # budgets that hit rates are shown for as well


@with_options
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or 'demo'.")],
    plot: Annotated[Path | None, typer.Option(help="Draw a sweep, predicted and measured, as a PNG.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine again.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show how a memory budget would be spent on a model, and how fast it would be.

    The first token is that of a prompt of --context tokens, 1,000 if not given; --quantization: as if it were packed.
    """
    from layerstream.checkpoint.hub import are_weights_here, locate_headers
    from layerstream.hardware.accelerators import is_there
    from layerstream.model.assumed import assume_weights, has_config_alone
    from layerstream.model.kernels import fused_rows
    from layerstream.planner.advice import advise, quantised
    from layerstream.setup.plan_model import devices_of, plan_facts, spend

    asked = engine.config(model)
    folder = locate_headers(model, revision=asked.revision)
    if plot is not None:
        from layerstream.measuring.plot import check, draw

        check(plot)
        if asked.quantization is not None or not are_weights_here(folder):
            raise ConfigurationError("--plot runs the model: pass a folder with its weights, as they are to be run")
    if has_config_alone(folder):
        typer.echo(f"{folder} has no weights: this is what they would be by its config, in 16 bits\n")
        folder = assume_weights(folder)
    config = _beside_draft_model(dataclasses.replace(asked, packed=folder))
    facts, skeleton, _ = plan_facts(config)
    if asked.quantization is not None:
        facts = quantised(facts, asked.quantization, fused_rows) or facts
    context = min(asked.max_context or PROMPT_TOKENS, facts.context_length)
    made = spend(config, facts)
    typer.echo(made)
    typer.echo(f"\n{'minimum budget':<20}{format_size(minimum_bytes(config, facts)):>11}  below it nothing runs")
    missing = [str(wanted) for wanted in devices_of(config) if not is_there(wanted)]
    if missing:
        typer.echo(f"how fast it would be: run this where there is {' and '.join(missing)}")
        return
    forecast = _forecast(config, made, skeleton, context, again=probe)
    for name, value, note in _rows(forecast):
        typer.echo(f"{name:<20}{value:>11}  {note}".rstrip())
    best = advise(facts, forecast, fused_rows)
    typer.echo(f"\n{_advice(best)}")
    if plot is not None:
        typer.echo(f"drawn to {draw(config, forecast, plot)}")


def _advice(best: list[Advice]) -> str:
    """What would help, as an option of the commands that run the model."""
    if not best:
        return "nothing that is known here would make it much faster"
    return f"what would help most: {in_shell_words(str(best[0]))}"


def _beside_draft_model(config: EngineConfig) -> EngineConfig:
    """*config* with what its draft model takes set apart."""
    if config.draft_model is None:
        return config
    from layerstream.setup.draft import draft_config
    from layerstream.setup.plan_model import plan_model

    draft = plan_model(draft_config(config))[0]
    return dataclasses.replace(
        config,
        reserved_bytes=draft.planned_bytes,
        reserved_host_bytes=0 if draft.host is None else draft.host.planned_bytes,
    )


def _forecast(config: EngineConfig, made: Plan, skeleton: Skeleton, context: int, *, again: bool) -> Forecast:
    from layerstream.measuring.rates import rates_for
    from layerstream.planner.forecast import Forecast
    from layerstream.setup.plan_model import devices_of

    rates = rates_for(skeleton, devices_of(config)[0], again=again)
    return Forecast(made, rates, str(skeleton.dtype).removeprefix("torch."), context)


def _rows(forecast: Forecast) -> Iterator[tuple[str, str, str]]:
    plan, rates = forecast.plan, forecast.rates
    at_once = forecast.used_bytes < forecast.process_bytes
    yield "whole process", format_size(forecast.process_bytes), "with Python and the libraries" + ", at most" * at_once
    if at_once:
        yield "", format_size(forecast.used_bytes), f"with one prompt of {forecast.context_tokens:,} tokens"
    if forecast.device_bytes is not None:
        yield "whole process", format_size(forecast.device_bytes), "on the device, with its libraries"
    yield "disk", f"{format_streamed(int(rates.disk))}/s", _disk_note(rates.disk, forecast)
    if rates.link:
        yield "link", f"{format_streamed(int(rates.link))}/s", "host memory to device"
    yield "sweep", format_seconds(forecast.sweep_seconds), f"one token; the {forecast.bound_by} takes longest"
    if plan.weights.expert_slots:
        yield from _expert_rows(plan)
    elif plan.streams:
        yield "N*", f"{forecast.free_tokens:,}", "tokens of a prompt that a sweep computes meanwhile"
    tokens = f"{forecast.context_tokens:,} tokens"
    yield "first token, cold", format_seconds(forecast.cold_seconds), f"prompt of {tokens}"
    yield "first token, warm", format_seconds(forecast.warm_seconds), "its KV stored"
    yield "tokens per second", f"{forecast.tokens_per_second:.2f}", "one answer, guesses included"
    yield "KV", format_size(forecast.kv_bytes_per_thousand), "per 1,000 tokens, in memory and in the store"
    if plan.facts.state_bytes:
        yield "states", format_size(plan.facts.state_bytes), "per sequence or snapshot, however many tokens it has"
    yield "weights on disk", format_size(plan.facts.stored_bytes), "nothing is written, unless packed"


def _expert_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """What a token uses of the experts, and how much of that is in memory, with this budget and with more."""
    facts, weights = plan.facts, plan.weights
    node = facts.experts[0]
    active = facts.stored_bytes - sum((n.num_experts - n.top_k) * n.expert_bytes for n in facts.experts)
    yield "experts", f"{node.top_k} of {node.num_experts}", f"for a token, in each of {len(facts.experts)} layers"
    yield "active weights", format_size(active), f"of {format_size(facts.stored_bytes)}, for a token"
    note = "as they were used so far" if facts.expert_shares else "if all are used alike"
    place = "in memory"
    yield "hit rate", f"{plan.expert_hit_rate:.0%}", f"of experts {place}, {note}"
    if plan.host is not None:
        place = "on the device"
        yield "", f"{plan.hit_rate(weights.expert_slots):.0%}", place
    for more in EXPERT_CURVE:
        slots = weights.expert_slots + int((more - 1) * plan.budget_bytes) // weights.slot_bytes
        rate = plan.hit_rate(slots)
        wanted = in_shell_words(f"memory={format_size(int(more * plan.budget_bytes), exact=True)!r}")
        yield "", f"{rate:.0%}", f"{place}, with {wanted}"
        if rate == 1.0:
            return


def minimum_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """The smallest budget that a model of *facts* runs within."""
    from layerstream.setup.plan_model import spend

    try:
        spend(dataclasses.replace(config, memory_bytes=1, memory_each=(1,) * len(config.memory_each)), facts)
    except BudgetTooSmall as error:
        return error.required_bytes
    return 1


def _disk_note(rate: float, forecast: Forecast) -> str:
    from layerstream.planner.rates import SLOW_DISK

    if rate < SLOW_DISK and forecast.plan.disk_bytes:
        return f"slow: every sweep waits {format_seconds(forecast.read_seconds)} for it; move the model"
    return "direct reads of the model's files"
