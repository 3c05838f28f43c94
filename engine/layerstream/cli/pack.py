"""``layerstream pack``: a checkpoint in fewer bits, so that every sweep reads less."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError


def pack(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; started again, it goes on where it stopped.")],
    nf4: Annotated[
        bool, typer.Option("--nf4", help="bitsandbytes' 4 bits: plain transformers loads them too.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="bitsandbytes' 8 bits.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="4-bit integers in groups, the fastest on a CPU.")] = False,
    keep_head: Annotated[bool, typer.Option("--keep-head", help="Leave the output projection in 16 bits.")] = False,
) -> None:
    """Write a model with its matrices in 4 or 8 bits."""
    chosen = [kind for kind, wanted in (("nf4", nf4), ("int8", int8), ("int4", int4)) if wanted]
    if len(chosen) != 1:
        raise ConfigurationError("choose one of --nf4, --int8 and --int4")
    from layerstream.checkpoint.hub import locate
    from layerstream.setup.pack import pack as run

    report = run(locate(model), out, chosen[0], keep_head=keep_head, on_shard=_show if sys.stderr.isatty() else _skip)
    share = report.packed_bytes / report.source_bytes
    kept = f"; {report.num_kept} files were there already" if report.num_kept else ""
    typer.echo(
        f"{out}: {format_size(report.packed_bytes)}, {share:.0%} of {format_size(report.source_bytes)}, in "
        f"{report.num_written + report.num_kept} files{kept}"
    )


def _show(done: int, count: int, num_bytes: int) -> None:
    line = f"\r{done} of {count} files, {format_size(num_bytes)}"
    typer.echo(line.ljust(60) + ("\n" if done == count else ""), nl=False, err=True)


def _skip(done: int, count: int, num_bytes: int) -> None:
    pass
