"""``layerstream bench``: how fast a model answers questions on this machine, and what every sweep brings."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.cli.ask import submit
from layerstream.cli.bench_experts import experts
from layerstream.cli.demo import FOLDER, load_questions
from layerstream.cli.options import Device, DeviceMap, HostMemory, Memory, Model, split
from layerstream.cli.report import format_seconds, format_streamed
from layerstream.demo.retrieval import Retriever, load_documents
from layerstream.errors import DocumentError
from layerstream.params import SamplingParams
from layerstream.sizes import format_size

if TYPE_CHECKING:
    from layerstream.completion import Completion
    from layerstream.engine import LayerStream
    from layerstream.stats import EngineStats

app = typer.Typer(help="Measure a model on this machine.", invoke_without_command=True)
app.command()(experts)
SWEEPS = 8


@app.callback()
def sweeps(
    context: typer.Context,
    model: Model = "demo",
    memory: Memory = None,
    host_memory: HostMemory = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    trace: Annotated[Path | None, typer.Option(help="Write what a sweep does to a file for ui.perfetto.dev.")] = None,
) -> None:
    """Sweeps of one token: seconds, and what they wait for. With a command: something else."""
    if context.invoked_subcommand is not None:
        return
    from layerstream.engine import LayerStream

    with LayerStream(
        model,
        device=device,
        device_map=device_map,
        memory=split(memory),
        host_memory=host_memory,
        kv_store=None,
        speculation="off",
    ) as engine:
        prompt = engine.encode("a")[:1]
        _answer(engine, prompt, 2)  # the first sweeps warm up
        of_prompt = _answer(engine, prompt, 1)
        of_answer = _answer(engine, prompt, 1 + SWEEPS)
        seconds, waited, streamed = (
            max(0.0, long - short) / SWEEPS for long, short in zip(of_answer, of_prompt, strict=True)
        )
        if trace is not None:
            with engine.record() as timeline:
                _answer(engine, prompt, 3)
            timeline.write_chrome(trace)
        after = engine.stats()
        typer.echo(f"{engine.model_name}: {format_seconds(seconds)} per sweep of one token ({SWEEPS} sweeps)")
        typer.echo(
            f"moved per sweep     {format_streamed(int(streamed))}, {format_streamed(int(streamed / seconds))}/s"
        )
        typer.echo(f"waited for it       {format_seconds(waited)}, {waited / seconds:.0%} of the sweep")
        typer.echo(f"peak                {format_size(after.peak_memory_bytes)} of {format_size(after.budget_bytes)}")
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
def rag(
    model: Model = "demo",
    memory: Memory = None,
    host_memory: HostMemory = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    docs: Annotated[Path | None, typer.Option(help="A folder of documents; the bundled ones if not given.")] = None,
    questions: Annotated[Path | None, typer.Option(help="A text file with a question per line.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    draft_model: Annotated[str | None, typer.Option(help="A small model with the same tokenizer that guesses.")] = None,
) -> None:
    """Questions about documents: one at a time, once more from the KV store, and all at once with an empty store."""
    if (docs is None) != (questions is None):
        raise DocumentError("--docs and --questions belong together: a folder, and a file with a question per line")
    asked = _load_questions(questions)
    retriever = Retriever(load_documents(docs or FOLDER / "documents"))
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    from layerstream.engine import LayerStream

    runs = (("one at a time", "a", False), ("asked again", "a", False), ("all at once", "b", True))
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="layerstream-bench-") as folder:
        for name, store, at_once in runs:
            with LayerStream(
                model,
                device=device,
                device_map=device_map,
                memory=split(memory),
                host_memory=host_memory,
                kv_store=Path(folder) / store,
                draft_model=draft_model,
            ) as engine:
                if not rows:
                    _introduce(engine, len(asked))
                engine.generate([[engine.encode("a")[0]]], SamplingParams(max_tokens=1))  # the first sweep warms up
                before, started = engine.stats(), time.perf_counter()
                completions = _ask(engine, retriever, asked, params, at_once=at_once)
                seconds = time.perf_counter() - started
                stats = engine.stats()
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
