"""``layerstream bench``: how fast a model answers questions on this machine, and what every sweep brings."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.api.params import SamplingParams
from layerstream.cli.ask import submit
from layerstream.cli.bench_experts import experts, without_guesses
from layerstream.cli.demo import FOLDER, load_questions
from layerstream.cli.options import EngineOptions, Model, SamplingOptions, with_options
from layerstream.cli.report import format_seconds, format_streamed
from layerstream.core.sizes import format_size
from layerstream.demo.retrieval import Retriever, load_documents
from layerstream.errors import ConfigurationError, DocumentError

if TYPE_CHECKING:
    from layerstream.api.completion import Completion
    from layerstream.engine import LayerStream
    from layerstream.stats import EngineStats

app = typer.Typer(help="Measure a model on this machine.", invoke_without_command=True)
app.command()(experts)
SWEEPS = 8
MAX_TOKENS = 64  # of an answer about documents


@app.callback()
@with_options
def sweeps(
    context: typer.Context,
    model: Model = "demo",
    trace: Annotated[Path | None, typer.Option(help="Write what a sweep does to a file for ui.perfetto.dev.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Sweeps of one token: seconds, and what they wait for. With a command: something else."""
    if context.invoked_subcommand is not None:
        if engine != EngineOptions() or trace is not None:
            raise ConfigurationError(f"options go behind the command: layerstream bench {context.invoked_subcommand} …")
        return
    with without_guesses(engine).open(model, kv_store=None, speculation="off") as opened:
        prompt = opened.encode("a")[:1]
        _answer(opened, prompt, 2)  # the first sweeps warm up
        of_prompt = _answer(opened, prompt, 1)
        of_answer = _answer(opened, prompt, 1 + SWEEPS)
        seconds, waited, streamed = (
            max(0.0, long - short) / SWEEPS for long, short in zip(of_answer, of_prompt, strict=True)
        )
        if trace is not None:
            with opened.record() as timeline:
                _answer(opened, prompt, 3)
            timeline.write_chrome(trace)
        after = opened.stats()
        typer.echo(f"{opened.model_name}: {format_seconds(seconds)} per sweep of one token ({SWEEPS} sweeps)")
        typer.echo(
            f"moved per sweep     {format_streamed(int(streamed))}, {format_streamed(int(streamed / seconds))}/s"
        )
        typer.echo(f"waited for it       {format_seconds(waited)}, {waited / seconds:.0%} of the sweep")
        typer.echo(f"measured peak       {format_size(after.peak_memory_bytes)} of {format_size(after.budget_bytes)}")
    if trace is not None:
        typer.echo(f"trace               {trace}: open it in ui.perfetto.dev")


def _answer(engine: LayerStream, prompt: list[int], max_tokens: int) -> tuple[float, float, int]:
    """Seconds of the sweeps of an answer, how long they waited for weights, and weights that they moved."""
    before = engine.stats()
    engine.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0))
    after = engine.stats()
    return (
        after.sweep_seconds - before.sweep_seconds,
        after.wait_seconds - before.wait_seconds,
        after.weight_bytes_streamed - before.weight_bytes_streamed,
    )


@app.command()
@with_options
def rag(
    model: Model = "demo",
    docs: Annotated[Path | None, typer.Option(help="A folder of documents; the bundled ones if not given.")] = None,
    questions: Annotated[Path | None, typer.Option(help="A text file with a question per line.")] = None,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Questions about documents: one at a time, once more from the KV store, and all at once with an empty store.

    The stores are made for this, and removed: in the folder that --kv-store names, or among other temporary files.
    """
    if (docs is None) != (questions is None):
        raise DocumentError("--docs and --questions belong together: a folder, and a file with a question per line")
    asked = _load_questions(questions)
    retriever = Retriever(load_documents(docs or FOLDER / "documents"))
    params = sampling.params(max_tokens=MAX_TOKENS, temperature=0.0)
    runs = (("one at a time", "a", False), ("asked again", "a", False), ("all at once", "b", True))
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="layerstream-bench-", dir=engine.kv_store) as folder:
        for name, store, at_once in runs:
            placed = engine if engine.no_kv_store else replace(engine, kv_store=str(Path(folder) / store))
            with placed.open(model) as opened:
                if not rows:
                    _introduce(opened, len(asked))
                opened.generate([[opened.encode("a")[0]]], SamplingParams(max_tokens=1))  # the first sweep warms up
                before, started = opened.stats(), time.perf_counter()
                completions = _ask(opened, retriever, asked, params, at_once=at_once)
                seconds = time.perf_counter() - started
                stats = opened.stats()
                rows.append([name, *_describe(before, stats, completions, seconds)])
    table = Table(box=None, pad_edge=False)
    for column in ("", "questions/h", "sweeps each", "tokens/sweep", "guessed right", "cached"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    typer.echo()
    for name, counted in stats.drafters.items():
        typer.echo(f"guesses of {name}: {counted.accepted:,} of {counted.drafted:,} right")
    typer.echo(f"tokens that a grammar forced: {stats.forced_tokens:,}")


def _load_questions(path: Path | None) -> list[str]:
    if path is None:
        return [question.question for question in load_questions(FOLDER / "questions.json")]
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    if not any(lines):
        raise DocumentError(f"{path} has no question in it; expected one per line")
    return [line for line in lines if line]


def _introduce(engine: LayerStream, num_questions: int) -> None:
    stats, plan = engine.stats(), engine.plan
    typer.echo(
        f"{engine.model_name}: {format_size(stats.model_bytes)} of weights, a budget of "
        f"{format_size(stats.budget_bytes)},\n{format_size(plan.streamed_bytes)} read for every sweep; "
        f"{num_questions} questions\n"
    )


def _ask(
    engine: LayerStream, retriever: Retriever, questions: list[str], params: SamplingParams, *, at_once: bool
) -> list[Completion]:
    found = [(question, retriever.retrieve(question, 2)) for question in questions]
    pairs = [(question, passages) for question, passages in found if passages]
    if not pairs:
        raise DocumentError("no document shares a word with a question")
    if not at_once:
        return [submit(engine, question, passages, params)[0].result() for question, passages in pairs]
    with engine.gang(len(pairs)):
        requests = [submit(engine, question, passages, params)[0] for question, passages in pairs]
    return [request.result() for request in requests]


def _describe(
    before: EngineStats, after: EngineStats, completions: list[Completion], seconds: float
) -> tuple[str, str, str, str, str]:
    sweeps = after.sweeps - before.sweeps
    drafted = after.drafted_tokens - before.drafted_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    prompts = sum(completion.usage.prompt_tokens for completion in completions)
    cached = sum(completion.usage.cached_tokens for completion in completions)
    return (
        f"{3600 * len(completions) / seconds:,.0f}",
        f"{sweeps / len(completions):.2f}",
        f"{(after.tokens_out - before.tokens_out) / sweeps:.2f}",
        f"{accepted / drafted:.0%}" if drafted else "-",
        f"{cached / prompts:.0%}",
    )
