"""``layerstream warm``: prefill a folder of documents ahead of questions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.cli.doctor import why_not_writable
from layerstream.cli.options import EngineOptions, Model, with_options
from layerstream.core.sizes import format_size
from layerstream.demo.retrieval import load_documents, split_passages
from layerstream.errors import KVStoreUnusable, StorageFull
from layerstream.store.config import KVStoreConfig, store_config

if TYPE_CHECKING:
    from layerstream.warming import WarmForecast

DOCUMENTS_PER_PROMPT = 4  # as layerstream.warming has it, which brings torch


@with_options
def warm(
    docs: Annotated[Path, typer.Option(help="A folder of txt, md and pdf files, or one such file.")],
    model: Model = "demo",
    prompt: Annotated[
        Path | None, typer.Option(help="A file with the template that questions use: {context}, {question}.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Whole documents rather than passages.")] = False,
    top: Annotated[
        int | None, typer.Option(min=1, help="So many at most, those that questions retrieved most often.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What they may take on disk, such as 20GB; the most popular come first.")
    ] = None,
    per_prompt: Annotated[
        int, typer.Option("--per-prompt", min=1, help="How many a question retrieves: for the forecast alone.")
    ] = DOCUMENTS_PER_PROMPT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Compute what questions about these documents share, and keep it. Interrupted, it goes on where it stopped."""
    documents = load_documents(docs, lambda line: typer.echo(line, err=True))
    texts = [d.text for d in documents] if whole else [p.text for d in documents for p in split_passages(d)]
    template = None if prompt is None else prompt.read_text("utf-8")
    store = store_config(engine.arguments().get("kv_store", "auto"))
    # the default store is asked for here: where it cannot be used, that is the error, and not that there is none
    with engine.open(model, kv_store=store) as opened:
        chosen = {"prompt": template, "top": top, "budget": budget}
        try:
            forecast = opened.forecast_warm(texts, documents_per_prompt=per_prompt, **chosen)
        except StorageFull:
            if store is not None:
                check_room(store)  # a full disk is the better reason
            raise
        typer.echo(_describe(forecast, "document" if whole else "passage"))
        if not forecast.missing_tokens:
            return
        if store is not None:
            check_room(store)
        if dry_run:
            return
        report = opened.warm(texts, **chosen, on_document=_show if sys.stderr.isatty() else None)
        rate = report.computed_tokens / max(report.seconds, 1e-3)
        typer.echo(f"{report.computed_tokens:,} tokens in {report.seconds:.1f} s ({rate:,.0f} tokens/s)")
        left = opened.forecast_warm(texts, **chosen).missing_tokens
    if left:
        raise StorageFull(f"{left:,} tokens are not stored: they were evicted for others, or could not be written")


def check_room(store: KVStoreConfig) -> None:
    """Nothing, if something can be written to *store*.

    Raises:
        KVStoreUnusable: its folder is only read. StorageFull: its disk is as full as it may be.
    """
    if reason := why_not_writable(store.path):
        raise KVStoreUnusable(f"{store.path} cannot be written ({reason}): pass another folder as kv_store")
    free, least = shutil.disk_usage(store.path).free, store.min_free
    if free < least:
        raise StorageFull(
            f"{store.path}: {format_size(free)} are free on its disk, and the store leaves {format_size(least)} free: "
            "make room, or pass a folder on another disk as kv_store"
        )


def _describe(forecast: WarmForecast, what: str) -> str:
    many = f"{forecast.chosen:,} of {forecast.documents:,}" if forecast.left_out else f"{forecast.documents:,}"
    about = "about " if forecast.encoded < forecast.chosen else ""
    begun = f"{many} {what}s, {about}{forecast.prefix_tokens:,} tokens: "
    if not forecast.missing_tokens:
        return f"{begun}all stored already"
    time = "" if forecast.seconds is None else f", about {_duration(forecast.seconds)}"
    share = "" if forecast.reused_share is None else f"\nabout {forecast.reused_share:.0%} of later prompts are reused"
    return (
        f"{begun}{forecast.missing_tokens:,} to compute{time};\n"
        f"{format_size(forecast.missing_bytes)} on disk, with {format_size(forecast.stored_bytes)} there and "
        f"{format_size(forecast.max_bytes)} allowed{share}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _show(done: int, count: int) -> None:
    typer.echo(f"\r{done} of {count}" + ("\n" if done == count else ""), nl=False, err=True)
