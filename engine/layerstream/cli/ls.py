"""``layerstream ls``: the models in the hub's cache, and what each would take here. Only headers are read.

What is wrong with one is said in its row; nothing that lies there keeps the others from being listed.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.cli.answering import is_terminal, printable
from layerstream.cli.failures import explain
from layerstream.cli.report import format_streamed
from layerstream.core.sizes import format_size
from layerstream.errors import BudgetTooSmall, LayerStreamError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

LONGEST_NAME = 40
_IN_CACHE = re.compile(r"\bmodels--([\w.-]+)")


@dataclass(frozen=True, slots=True)
class Found:
    """A model: what to call it, where it lies, and its bytes; ``damage`` is why it cannot even be looked at."""

    name: str
    path: Path
    num_bytes: int
    damage: str = ""


def ls(
    cache: Annotated[Path | None, typer.Argument(help="A cache of the hub, if not the default one.")] = None,
) -> None:
    """List the models that are here, and what each would take: the smallest budget, and what it would do in memory."""
    models = list(find_models(cache))
    width = min(LONGEST_NAME, max(len(model.name) for model in models))
    typer.echo(f"{'model':<{width}}  {'size':>9}  {'at least':>9}  here")
    columns = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None
    for model in models:
        least, note = look_at(model)
        name = model.name if len(model.name) <= width else "…" + model.name[1 - width :]
        line = f"{name:<{width}}  {format_size(model.num_bytes):>9}  {least:>9}  {note}"
        typer.echo(printable(line, sys.stdout)[:columns])


def find_models(cache: Path | None) -> Iterator[Found]:
    """The bundled reader, and what the hub's cache has: of each repository what ``main`` is, else the newest.

    A cache that is not there has nothing.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from layerstream.checkpoint.hub import DEMO, bundled_reader

    reader = bundled_reader()
    yield Found(DEMO, reader, sum(path.stat().st_size for path in reader.iterdir()))
    try:
        scanned = scan_cache_dir(cache)
    except CacheNotFound:
        if cache is not None:
            raise FileNotFoundError(2, "no such folder", str(cache)) from None
        return
    for repository in sorted(scanned.repos, key=lambda one: one.repo_id.lower()):
        if repository.repo_type == "model":
            yield from _models(repository)
    for warning in scanned.warnings:
        damage = " ".join(str(warning).split())
        if named := _IN_CACHE.search(damage):  # other things lie there as well
            yield Found(named[1].replace("--", "/"), Path(), 0, damage)


def look_at(model: Found) -> tuple[str, str]:
    """The smallest budget, and what the model would do with the memory that there is, or why it does not run."""
    if model.damage:
        return "-", model.damage
    try:
        return _look_at(model.path)
    except Exception as error:  # noqa: BLE001  # whatever lies there: it is a row
        reason = explain(error) if isinstance(error, LayerStreamError | OSError) else f"{type(error).__name__}: {error}"
        return "-", reason.replace(f"{model.path}: ", "").replace(f"{model.path}/", "")


def _look_at(path: Path) -> tuple[str, str]:
    from layerstream.cli.plan import minimum_bytes
    from layerstream.setup.config import EngineConfig
    from layerstream.setup.plan_model import plan_facts, spend
    from layerstream.store.config import store_config

    config = EngineConfig(str(path), kv_store=store_config("auto"))
    facts, skeleton, _ = plan_facts(config)
    least, family = format_size(minimum_bytes(config, facts)), skeleton.config.model_type
    try:
        plan = spend(config, facts)
    except BudgetTooSmall as error:
        return least, f"{family}: {format_size(error.budget_bytes)} of memory can be had"
    if not plan.streams:
        return least, f"{family}: stays in memory, {format_size(plan.planned_bytes)}"
    return least, f"{family}: reads {format_streamed(plan.streamed_bytes)} a sweep"


def _models(repository: CachedRepoInfo) -> Iterator[Found]:
    """What can be run of *repository*: its snapshot, or each GGUF file in it."""
    revisions = sorted(repository.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
    if not revisions:
        yield Found(repository.repo_id, repository.repo_path, 0, damage="nothing of it was fetched")
        return
    snapshot = revisions[-1]
    ggufs = sorted((file for file in snapshot.files if file.file_name.endswith(".gguf")), key=lambda one: one.file_path)
    if not ggufs or any(file.file_name.endswith(".safetensors") for file in snapshot.files):
        yield Found(repository.repo_id, snapshot.snapshot_path, snapshot.size_on_disk)
        return
    for file in ggufs:
        yield Found(f"{repository.repo_id}/{file.file_name}", file.file_path, file.size_on_disk)
