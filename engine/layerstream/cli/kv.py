"""``layerstream kv``: what the KV store holds, whether it is whole, and room in it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.core.sizes import format_size, parse_size
from layerstream.errors import KVStoreUnusable, StorageFull
from layerstream.store.config import KVStoreConfig, default_folder

if TYPE_CHECKING:
    from layerstream.store.maintenance import NamespaceSummary
    from layerstream.store.tiers.folder import Access, StoreFolder

app = typer.Typer(help="Look after the store of computed prefixes.", no_args_is_help=True)

Store = Annotated[Path | None, typer.Option("--store", help="The folder, if not the default one.")]
Which = Annotated[str | None, typer.Argument(help="A model, or the beginning of an id, as ls shows them.")]
SHORT = 8  # characters of an id that are shown


@app.command("ls")
def list_(store: Store = None) -> None:
    """Show what is stored for which model, how large, how often used."""
    from layerstream.store.maintenance import summarise

    with _opened(store, or_files=True) as folder:
        if folder.has_files_only:
            typer.echo("the index cannot be opened: this is what the files say, without pins and answers", err=True)
        summaries = summarise(folder)
        if summaries:
            Console().print(_table(summaries))
        bound = KVStoreConfig(store).bound(folder.total_bytes())
        typer.echo(f"{folder.path}: {format_size(folder.total_bytes())} of at most {format_size(bound)}")


@app.command()
def verify(store: Store = None) -> None:
    """Read everything, drop what is damaged; exits 1 if something was."""
    from layerstream.store.maintenance import verify_all
    from layerstream.store.tiers.folder import Access

    with _opened(store, Access(is_suspect=True)) as folder:
        count = damaged = 0
        for path, damage in verify_all(folder):
            count += 1
            if damage is not None:
                damaged += 1
                typer.echo(f"{path.name}: {damage.reason}" + ("" if folder.read_only else "; dropped"))
        typer.echo(f"{count} segments read, {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(
    to: Annotated[str, typer.Option(help="Keep at most this much, such as 5GB.")],
    store: Store = None,
) -> None:
    """Evict what is worth least. What is pinned or being used stays."""
    from layerstream.store.maintenance import prune as prune_to

    wanted = parse_size(to)
    with _opened(store, writes=True) as folder:
        freed, left = prune_to(folder, wanted), folder.total_bytes()
        typer.echo(f"{format_size(freed)} freed, {format_size(left)} left")
        if left > wanted:
            typer.echo(_why_not(left, wanted, sum(row.num_bytes for row in folder.index.segments() if row.pinned)))


@app.command()
def clear(
    which: Which = None,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what is stored for a model, or everything, pinned or not, with the answers that are remembered."""
    from layerstream.store.maintenance import choose, summarise

    with _opened(store, writes=True, or_files=True) as folder:
        chosen = choose(folder, which)
        if chosen and not yes and _is_terminal():
            names = ", ".join(f"{_model(summary)} ({format_size(summary.num_bytes)})" for summary in chosen)
            typer.confirm(f"remove what is stored for {names}?", abort=True)
        freed = _clear(folder, chosen)
        typer.echo(f"{format_size(freed)} freed, {format_size(folder.total_bytes())} left")
        if not folder.has_files_only:
            return
        if not folder.index.segments():
            folder.remove_index()
            return
    with _opened(store, writes=True) as folder:  # there is room for the index now
        _clear(folder, [summary for summary in summarise(folder) if summary.name in {s.name for s in chosen}])


def _clear(folder: StoreFolder, chosen: list[NamespaceSummary]) -> int:
    """Clear *chosen*, say what had to stay; the bytes that became free."""
    from layerstream.store.maintenance import clear as clear_namespace
    from layerstream.store.maintenance import remaining_segments

    freed = sum(clear_namespace(folder, summary) for summary in chosen)
    stayed = [row for summary in chosen for row in remaining_segments(folder, summary)]
    if stayed:
        typer.echo(
            f"{len(stayed)} segments ({format_size(sum(row.num_bytes for row in stayed))}) stay, as an engine is "
            "reading them, or what continues them: close it, and clear again"
        )
    return freed


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _why_not(left: int, wanted: int, pinned: int) -> str:
    text = f"that is more than {format_size(wanted)}: "
    if pinned:
        text += f"{format_size(pinned)} are pinned, as what was warmed is, and stay until `layerstream kv clear MODEL`"
    rest = left - pinned
    if rest > wanted or not pinned:
        text += f"{'; ' if pinned else ''}{format_size(rest)} are continued by what stays, or are being read"
    return text


@app.command()
def export(
    which: Annotated[str, typer.Argument(help="A model, or the beginning of an id, as ls shows them.")],
    out: Annotated[Path, typer.Argument(help="The tar file to write.")],
    store: Store = None,
) -> None:
    """Write what is stored for a model to a file, to take it to another machine."""
    from layerstream.store.maintenance import choose
    from layerstream.store.maintenance import export as export_namespace

    if out.exists():
        raise KVStoreUnusable(f"{out} is there already; name another file, or remove it first")
    with _opened(store) as folder:
        chosen = choose(folder, which)
        if len(chosen) > 1:
            ids = ", ".join(summary.name[:SHORT] for summary in chosen)
            raise KVStoreUnusable(f"{which!r} is stored under several ids ({ids}): say which")
        count = export_namespace(folder, chosen[0], out)
        typer.echo(f"{count} segments, {format_size(out.stat().st_size)}: {out}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file that export wrote.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(envvar="LAYERSTREAM_MODEL", help="The model that it is for.")],
    memory: Annotated[str | None, typer.Option(help="The budget that the model will run with.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype that it will compute in.")] = "auto",
    store: Store = None,
) -> None:
    """Take over what another machine has computed, if this one would compute exactly the same."""
    from layerstream.setup.assembly import identify
    from layerstream.setup.config import EngineConfig
    from layerstream.store.maintenance import import_ as import_file
    from layerstream.store.tiers.folder import Bounds

    config = KVStoreConfig(store)
    budget = None if memory is None else parse_size(memory)
    with _opened(store, writes=True, must_exist=False) as folder:
        namespace, about = identify(
            EngineConfig(model, memory_bytes=budget, dtype=dtype, kv_store=config), config, folder.index
        )
        bounds = Bounds(config.bound(folder.total_bytes()), config.min_free)
        done = import_file(folder, source, namespace, about, bounds)
        typer.echo(f"{done.new} segments are new")
        for count, what in (
            (done.damaged, "are damaged and were left out"),
            (done.without_room, f"found no room within {format_size(bounds.max_bytes)}, or lack their beginning"),
        ):
            if count:
                typer.echo(f"{count} segments {what}")


@contextlib.contextmanager
def _opened(
    store: Path | None,
    access: Access | None = None,
    *,
    writes: bool = False,
    or_files: bool = False,
    must_exist: bool = True,
) -> Iterator[StoreFolder]:
    """The folder, while inside; whatever its disk or its index does becomes an error that says so.

    Args:
        or_files: where the index cannot be opened, as on a full disk, the files alone.
    """
    from layerstream.store.database import explain
    from layerstream.store.tiers.folder import Access, StoreFolder, StoreUnavailable

    path = store if store is not None else default_folder()
    if must_exist and not path.exists():
        raise KVStoreUnusable(f"{path}: there is no KV store yet")
    try:
        folder = StoreFolder(path, access or Access())
    except StoreUnavailable:
        if not or_files:
            raise
        folder = StoreFolder(path, Access(has_files_only=True))
    try:
        if writes and folder.read_only:
            raise KVStoreUnusable(f"{path} is read-only: nothing can be changed in it")
        yield folder
    except (KVStoreUnusable, StorageFull):
        raise
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"{path}: {explain(error)}") from error
    finally:
        folder.close()


def _table(summaries: list[NamespaceSummary]) -> Table:
    """A row for each; of snapshots only where there are some."""
    rows = [
        {
            "id": summary.name[:SHORT],
            "model": _model(summary),
            "tokens": f"{summary.tokens:,}",
            "snapshots": f"{summary.snapshots:,}, {format_size(summary.snapshot_bytes)}",
            "size": format_size(summary.num_bytes),
            "pinned": format_size(summary.pinned_bytes),
            "answers": str(summary.answers),
            "hits": str(summary.hits),
            "last used": _ago(summary.last_used),
        }
        for summary in summaries
    ]
    names = [name for name in rows[0] if name != "snapshots" or any(summary.snapshots for summary in summaries)]
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in ("id", "model") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _model(summary: NamespaceSummary) -> str:
    name = summary.model.rstrip("/")
    return name if len(name) <= 24 else "…" + name[-23:]


def _ago(moment: float) -> str:
    if not moment:
        return "-"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
