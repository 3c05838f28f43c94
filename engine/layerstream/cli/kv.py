"""``layerstream kv``: what the KV store holds, whether it is whole, and room in it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from layerstream.errors import KVStoreUnusable
from layerstream.kv.config import KVStoreConfig, default_folder
from layerstream.sizes import format_size, parse_size

if TYPE_CHECKING:
    from layerstream.kv.maintenance import NamespaceSummary
    from layerstream.kv.tiers.folder import Access, StoreFolder

app = typer.Typer(help="Look after the store of computed prefixes.", no_args_is_help=True)

Store = Annotated[Path | None, typer.Option("--store", help="The folder, if not the default one.")]
Which = Annotated[str | None, typer.Argument(help="A model, or the beginning of an id, as ls shows them.")]
SHORT = 8  # characters of an id that are shown


@app.command("ls")
def list_(store: Store = None) -> None:
    """Show what is stored for which model, how large, how often used."""
    from layerstream.kv.maintenance import summarise
    from layerstream.kv.tiers.folder import StoreUnavailable

    try:
        folder = _open(store)
    except StoreUnavailable as error:
        folder = _open_files(store)
        typer.echo(f"{error}; this is what the files alone say, without pins and answers", err=True)
    try:
        summaries = summarise(folder)
        table = Table(box=None, pad_edge=False)
        for name in ("id", "model", "tokens", "size", "pinned", "answers", "hits", "last used"):
            table.add_column(name, justify="left" if name in ("id", "model") else "right", overflow="fold")
        for summary in summaries:
            table.add_row(
                summary.name[:SHORT], _model(summary), f"{summary.tokens:,}", format_size(summary.num_bytes),
                format_size(summary.pinned_bytes), str(summary.answers), str(summary.hits), _ago(summary.last_used),
            )  # fmt: skip
        if summaries:
            Console().print(table)
        bound = KVStoreConfig(store).bound(folder.total_bytes())
        typer.echo(f"{folder.path}: {format_size(folder.total_bytes())} of at most {format_size(bound)}")
    finally:
        folder.close()


@app.command()
def verify(store: Store = None) -> None:
    """Read everything, drop what is damaged; exits 1 if something was."""
    from layerstream.kv.maintenance import verify_all
    from layerstream.kv.tiers.folder import Access

    folder = _open(store, Access(is_suspect=True))
    try:
        count = damaged = 0
        for path, damage in verify_all(folder):
            count += 1
            if damage is not None:
                damaged += 1
                typer.echo(f"{path.name}: {damage.reason}; dropped")
        typer.echo(f"{count} segments read, {damaged} damaged")
    finally:
        folder.close()
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(
    to: Annotated[str, typer.Option(help="Keep at most this much, such as 5GB.")],
    store: Store = None,
) -> None:
    """Evict what is worth least. What is pinned or being used stays."""
    from layerstream.kv.maintenance import prune as prune_to

    wanted = parse_size(to)
    folder = _open(store)
    try:
        freed, left = prune_to(folder, wanted), folder.total_bytes()
        typer.echo(f"{format_size(freed)} freed, {format_size(left)} left")
        if left > wanted:
            typer.echo(_why_not(left, wanted, sum(row.num_bytes for row in folder.index.segments() if row.pinned)))
    finally:
        folder.close()


@app.command()
def clear(
    which: Which = None,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what is stored for a model, or everything, pinned or not, with the answers that are remembered."""
    from layerstream.kv.maintenance import choose, summarise
    from layerstream.kv.tiers.folder import StoreUnavailable

    try:
        folder, has_index = _open(store), True
    except StoreUnavailable:  # a full disk: files first, then there is room for the index
        folder, has_index = _open_files(store), False
    try:
        if folder.read_only:
            raise KVStoreUnusable(f"{folder.path} is read-only: nothing can be removed from it")
        chosen = choose(folder, which)
        if chosen and not yes and sys.stdin.isatty():
            names = ", ".join(f"{_model(summary)} ({format_size(summary.num_bytes)})" for summary in chosen)
            typer.confirm(f"remove what is stored for {names}?", abort=True)
        freed = _clear(folder, chosen)
        typer.echo(f"{format_size(freed)} freed, {format_size(folder.total_bytes())} left")
    finally:
        folder.close()
    if not has_index:
        folder = _open(store)
        try:
            _clear(folder, [summary for summary in summarise(folder) if summary.name in {s.name for s in chosen}])
        finally:
            folder.close()


def _clear(folder: StoreFolder, chosen: list[NamespaceSummary]) -> int:
    """Clear *chosen*, say what had to stay; the bytes that became free."""
    from layerstream.kv.maintenance import clear as clear_namespace
    from layerstream.kv.maintenance import remaining_segments

    freed = sum(clear_namespace(folder, summary) for summary in chosen)
    stayed = [row for summary in chosen for row in remaining_segments(folder, summary)]
    if stayed:
        typer.echo(
            f"{len(stayed)} segments ({format_size(sum(row.num_bytes for row in stayed))}) stay, as an engine is "
            "reading them: close it, and clear again"
        )
    return freed


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
    from layerstream.kv.maintenance import choose
    from layerstream.kv.maintenance import export as export_namespace

    if out.exists():
        raise KVStoreUnusable(f"{out} is there already; name another file, or remove it first")
    folder = _open(store)
    try:
        chosen = choose(folder, which)
        if len(chosen) > 1:
            ids = ", ".join(summary.name[:SHORT] for summary in chosen)
            raise KVStoreUnusable(f"{which!r} is stored under several ids ({ids}): say which")
        count = export_namespace(folder, chosen[0], out)
        typer.echo(f"{count} segments, {format_size(out.stat().st_size)}: {out}")
    finally:
        folder.close()


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file that export wrote.", exists=True, dir_okay=False)],
    model: Annotated[str, typer.Option(envvar="LAYERSTREAM_MODEL", help="The model that it is for.")],
    memory: Annotated[str | None, typer.Option(help="The budget that the model will run with.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype that it will compute in.")] = "auto",
    store: Store = None,
) -> None:
    """Take over what another machine has computed, if this one would compute exactly the same."""
    from layerstream.assembly import identify
    from layerstream.config import EngineConfig
    from layerstream.kv.maintenance import import_ as import_file
    from layerstream.kv.tiers.folder import Bounds

    config = KVStoreConfig(store)
    budget = None if memory is None else parse_size(memory)
    folder = _open(store, must_exist=False)
    try:
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
    finally:
        folder.close()


def _open(store: Path | None, access: Access | None = None, *, must_exist: bool = True) -> StoreFolder:
    from layerstream.kv.tiers.folder import Access, StoreFolder

    return StoreFolder(_path(store, must_exist), access or Access())


def _open_files(store: Path | None) -> StoreFolder:
    """The files alone, where there is no room for the index."""
    from layerstream.kv.tiers.folder import Access

    return _open(store, Access(without_index=True))


def _path(store: Path | None, must_exist: bool) -> Path:
    path = store if store is not None else default_folder()
    if must_exist and not path.exists():
        raise KVStoreUnusable(f"{path}: there is no KV store yet")
    return path


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
