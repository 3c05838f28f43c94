"""The command ``layerstream``; a file per command."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from layerstream import __version__
from layerstream.cli.ask import ask
from layerstream.cli.bench import app as bench
from layerstream.cli.demo import demo
from layerstream.cli.doctor import doctor
from layerstream.cli.kv import app as kv
from layerstream.cli.pack import pack
from layerstream.cli.plan import plan
from layerstream.cli.warm import warm
from layerstream.errors import LayerStreamError

INTERRUPTED = 130  # as shells do: 128 + SIGINT
FAILED = 2


class Commands(TyperGroup):
    """Turns errors that explain themselves into one line, and Ctrl-C into its exit code."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """``--debug`` may stand behind the command as well."""
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run the command; exits 130 when interrupted, 2 on an error of ours."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            ctx.exit(INTERRUPTED)
        except LayerStreamError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"layerstream: {error}", err=True)
            ctx.exit(FAILED)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command()(demo)
app.command()(ask)
app.command()(plan)
app.command()(doctor)
app.command()(pack)
app.command()(warm)
app.add_typer(kv, name="kv")
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerstream {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens; errors with their traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Language models that do not fit, streamed past a memory budget."""
    logger = logging.getLogger("layerstream")  # other libraries' logs are left as they are
    logger.setLevel(logging.INFO if debug else logging.ERROR)
    if debug:
        logger.addHandler(logging.StreamHandler())


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "·" is no reason to fail
    app(prog_name="layerstream")
