"""What ``layerstream --help`` and its commands say, as a page shows it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import typer
from layerstream.cli import app
from typer.testing import CliRunner

SHARED = ("Sampling", "Engine")
"""Boxes of options that several commands have alike; a page shows each once."""
WIDTH = {"COLUMNS": "80"}
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def show_commands() -> str:
    """The help of every command, and the boxes that several have once, behind them."""
    shared: dict[str, set[str]] = {}
    parts = []
    with mock.patch.dict(os.environ, WIDTH):
        for words in _commands(typer.main.get_command(app)):
            own, common = _split(_help(words))
            for name, box in common.items():
                shared.setdefault(name, set()).add(box)
            also = [f"[{name} options](#{name.lower()}-options)" for name in common]
            parts.append(f"## {' '.join(('layerstream', *words))}\n\n```text\n{own}\n```")
            parts += [f"And the {' and the '.join(also)}."] if also else []
    for name, boxes in shared.items():
        parts += [f"## {name} options", *(f"```text\n{box}\n```" for box in sorted(boxes))]
    return "\n\n".join(parts)


def _commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*words, name))


def _help(words: tuple[str, ...]) -> list[str]:
    said = CliRunner().invoke(app, [*words, "--help"], prog_name="layerstream").output
    return [line.strip() for line in STYLE.sub("", said).strip("\n").splitlines()]


def _split(lines: list[str]) -> tuple[str, dict[str, str]]:
    """What is a command's own, and the shared boxes by name."""
    own, common, box = [], {}, ""
    for line in lines:
        if line.startswith("╭─ "):
            box = line.split()[1]
        if box in SHARED:
            common.setdefault(box, []).append(line)
        else:
            own.append(line)
    return "\n".join(own).strip("\n"), {name: "\n".join(found) for name, found in common.items()}


if __name__ == "__main__":
    print(show_commands())
