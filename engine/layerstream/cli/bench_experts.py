"""``layerstream bench experts``: what sweeps read of a mixture of experts, and how much of it is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.api.params import SamplingParams
from layerstream.cli.demo import FOLDER, load_questions
from layerstream.cli.options import EngineOptions, Model, with_options
from layerstream.cli.report import format_seconds, format_streamed
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

SWEEPS = 8


@dataclass(frozen=True, slots=True)
class _Counts:
    """What answers of some questions at once took."""

    sweeps: int
    seconds: float
    hits: int
    misses: int
    read_bytes: int

    def less(self, other: _Counts) -> _Counts:
        return _Counts(
            self.sweeps - other.sweeps,
            self.seconds - other.seconds,
            self.hits - other.hits,
            self.misses - other.misses,
            self.read_bytes - other.read_bytes,
        )


@with_options
def experts(
    model: Model = "demo",
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Answers at once; 1, 4 and 16 if not given.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Experts that sweeps of some rows want, find in memory, and read; beside what the plan expected."""
    with without_guesses(engine).open(model, device="cpu", kv_store=None, speculation="off") as opened:
        stats, plan = opened.stats(), opened.plan
        if stats.experts is None:
            raise ConfigurationError(
                f"no experts of {opened.model_name} come as they are routed to: it has none, or all of them are in "
                f"memory; pass a mixture of experts, and a --memory smaller than {format_size(plan.planned_bytes)}"
            )
        typer.echo(
            f"{opened.model_name}\n{stats.experts.num_slots:,} of {stats.experts.num_experts:,} experts in memory, "
            f"{format_size(plan.facts.mean_expert_bytes)} each\n"
        )
        table = Table(box=None, pad_edge=False)
        for column in ("rows", "s per sweep", "wanted", "in memory", "read", "expected"):
            table.add_column(column, justify="right")
        _answers(opened, 1, 2)  # the first sweeps warm up
        for count in rows or [1, 4, 16]:
            of_prompts = _answers(opened, count, 1)
            found = _answers(opened, count, 1 + SWEEPS).less(of_prompts)
            wanted = found.hits + found.misses
            table.add_row(
                str(count),
                format_seconds(found.seconds / found.sweeps),
                f"{wanted / found.sweeps:,.0f}",
                f"{found.hits / max(1, wanted):.0%}",
                format_streamed(found.read_bytes // found.sweeps),
                format_streamed(plan.expert_read_bytes(count)),
            )
    Console().print(table)


def without_guesses(engine: EngineOptions) -> EngineOptions:
    """*engine*, if its sweeps have one token for each answer.

    Raises:
        ConfigurationError: guesses are wanted.
    """
    if engine.draft_model is not None or engine.speculation not in (None, "off"):
        raise ConfigurationError(
            "sweeps of one token are measured without guesses: leave out --draft-model and --speculation, or measure "
            "answers, with 'layerstream bench rag'"
        )
    return engine


def _answers(engine: LayerStream, count: int, max_tokens: int) -> _Counts:
    """Answer *count* questions at once with *max_tokens* each."""
    questions = islice(cycle(load_questions(FOLDER / "questions.json")), count)
    prompts = [engine.encode(f"{number}. {question.question}") for number, question in enumerate(questions)]
    before = engine.stats()
    with engine.gang(count):
        requests = [engine.submit(p, SamplingParams(max_tokens=max_tokens, ignore_eos=True)) for p in prompts]
    for request in requests:
        request.result()
    after = engine.stats()
    assert before.experts is not None
    assert after.experts is not None
    return _Counts(
        after.sweeps - before.sweeps,
        after.sweep_seconds - before.sweep_seconds,
        after.experts.hits - before.experts.hits,
        after.experts.misses - before.experts.misses,
        after.experts.streamed_bytes - before.experts.streamed_bytes,
    )
