"""What the shell is told when a command does not come to its end: one paragraph, and an exit code.

| code | when |
|---|---|
| 1 | it was begun and failed: a full disk, a damaged file, no memory; ``compare`` found a difference |
| 2 | what was asked for cannot be done: an option, a model that is not there, a prompt that is too long |
| 130, 141 | Ctrl-C; whoever read the answer is gone (128 + the signal, as shells have it) |
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import sys
from contextlib import suppress

import typer

from layerstream.cli.options import OPTION_NAMES, EngineOptions, SamplingOptions
from layerstream.errors import KVStoreUnusable, LayerStreamError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130
NOBODY_READS = 141
VARIABLE = "LAYERSTREAM_DEBUG"

_NAMES = {field.name for kind in (EngineOptions, SamplingOptions) for field in dataclasses.fields(kind)}
_NAME = re.compile(rf"(?<![\w.'/-])({'|'.join(sorted(name for name in _NAMES if '_' in name))})\b(?!['./=-])")
_ARGUMENT = re.compile(r"\b(\w+)=('[^']*'|\"[^\"]*\"|True|None|[\d.]+\b)")


def explain(error: Exception) -> str:
    """One paragraph that says what is wrong, in the words of the shell."""
    if isinstance(error, LayerStreamError):
        return in_shell_words(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (
        f"{type(error).__name__}: {error}; this is a fault of layerstream: run it again with --traceback to see where"
    )


def exit_code(error: Exception) -> int:
    """That of *error*; its builtin bases say whose fault it is."""
    is_misuse = isinstance(error, LayerStreamError) and isinstance(
        error, (ValueError, FileNotFoundError, KVStoreUnusable)
    )
    return MISUSED if is_misuse else FAILED


def in_shell_words(text: str) -> str:
    """*text* with arguments such as ``quantization='int4'`` and names such as ``kv_store`` as options."""
    return _NAME.sub(lambda match: _option(match[1]), _ARGUMENT.sub(_as_option, text))


def _as_option(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    if name not in _NAMES:
        return match[0]
    option = _option(name)
    if value == "None":
        return "--no-kv-store" if name == "kv_store" else f"no {option}"
    return option if value == "True" else f"{option} {shlex.quote(value.strip(chr(39) + chr(34)))}"


def _option(name: str) -> str:
    return f"--{OPTION_NAMES.get(name, name).replace('_', '-')}"


def is_usage_error(error: Exception) -> bool:
    """Whether typer shows *error* itself. (What these derive from depends on its version.)"""
    return hasattr(error, "format_message")


def wants_traceback(context: typer.Context) -> bool:
    """Whether an error is to be seen with where it comes from."""
    given = context.find_root().params
    return bool(given.get("traceback") or given.get("debug")) or os.environ.get(VARIABLE, "0") not in ("", "0")


def let_go_of_stdout() -> None:
    """Whoever read it is gone: what is still in the buffer goes nowhere, and without a word."""
    with suppress(OSError, ValueError):  # a stream of its own has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Notices(logging.Handler):
    """Warnings of the engine as lines on stderr, each once."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show *record*."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = in_shell_words(" ".join(text.split()))
            if text in self._shown:
                return
            self._shown.add(text)
        with suppress(OSError, ValueError):  # stderr may be closed
            typer.echo(f"layerstream: {text}", err=True)


def listen(*, debug: bool) -> None:
    """Show what this library logs: warnings, or all of it. Other libraries' logs are left as they are."""
    logger = logging.getLogger("layerstream")
    logger.setLevel(logging.INFO if debug else logging.WARNING)
    for handler in [known for known in logger.handlers if isinstance(known, Notices)]:
        logger.removeHandler(handler)
    logger.addHandler(Notices())
