"""The command ``layerstream``; a file per command."""

from __future__ import annotations

import difflib
import io
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from layerstream import __version__
from layerstream.cli.ask import ask
from layerstream.cli.bench import app as bench
from layerstream.cli.chat import chat
from layerstream.cli.compare import compare
from layerstream.cli.demo import demo
from layerstream.cli.doctor import doctor
from layerstream.cli.failures import (
    INTERRUPTED,
    NOBODY_READS,
    exit_code,
    explain,
    is_usage_error,
    let_go_of_stdout,
    listen,
    wants_traceback,
)
from layerstream.cli.kv import app as kv
from layerstream.cli.ls import ls
from layerstream.cli.pack import pack
from layerstream.cli.plan import plan
from layerstream.cli.reuse import app as reuse
from layerstream.cli.run import run
from layerstream.cli.warm import warm

ANYWHERE = ("--debug", "--traceback")
ELSEWHERE = {
    "complete": "run", "convert": "pack", "diff": "compare", "generate": "run", "index": "warm", "info": "plan",
    "ingest": "warm", "list": "ls", "models": "ls", "prefill": "warm", "prompt": "run", "quantize": "pack",
    "query": "ask", "repl": "chat", "show": "plan",
}  # fmt: skip
"""What other tools call it."""


class Group(TyperGroup):
    """Commands that say what a mistyped one might have been meant for."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple:  # type: ignore[override]
        """The command that *args* begin with."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            close = [*difflib.get_close_matches(name, self.commands), ELSEWHERE.get(name, "")]
            meant = " or ".join(repr(one) for one in dict.fromkeys(close) if one in self.commands)
            known = f"Did you mean {meant}?" if meant else f"There are {', '.join(self.commands)}."
            ctx.fail(f"No such command {name!r}. {known}")
        return super().resolve_command(ctx, args)


class Commands(Group):
    """Turns errors that explain themselves into one paragraph, and signals into their exit codes."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """``--debug`` and ``--traceback`` may stand behind the command as well."""
        end = args.index("--") if "--" in args else len(args)
        moved = [arg for arg in args[:end] if arg in ANYWHERE]
        return super().parse_args(ctx, [*moved, *(arg for arg in args[:end] if arg not in ANYWHERE), *args[end:]])

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Run the command; the exit codes are those of :mod:`~layerstream.cli.failures`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\ninterrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            let_go_of_stdout()
            ctx.exit(NOBODY_READS)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if is_usage_error(error) or wants_traceback(ctx):
                raise
            typer.echo(f"layerstream: {explain(error)}", err=True)
            ctx.exit(exit_code(error))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(chat)
app.command()(ask)
app.command()(ls)
app.command()(plan)
app.command()(warm)
app.command()(pack)
app.command()(demo)
app.command()(compare)
app.command()(doctor)
app.add_typer(kv, name="kv", cls=Group)
app.add_typer(bench, name="bench", cls=Group)
app.add_typer(reuse, name="reuse", cls=Group)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerstream {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens; errors with their traceback.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Errors with their traceback, as with LAYERSTREAM_DEBUG=1.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Language models that do not fit, streamed past a memory budget."""
    listen(debug=debug)


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "·" is no reason to fail
    app(prog_name="layerstream")
