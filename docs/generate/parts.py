"""Which parts of which pages come from the code, and the pages as they should be.

A part stands between ``<!-- name -->`` and ``<!-- /name -->``; a picture is a file of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import layerstream.errors

from docs.generate import charts, commands, house, models

DOCS = Path(__file__).parent.parent


def _draw_errors() -> str:
    tree = inspect.getdoc(layerstream.errors) or ""
    drawn = re.search(r"::\n\n(.*?)\n\n(?=\S)", tree, flags=re.S)
    assert drawn is not None, "errors.py draws no tree"
    return f"```text\n{inspect.cleandoc(drawn[1])}\n```"


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "architecture.md": {"floors": house.draw, "rooms": house.list_rooms},
    "cli.md": {"commands": commands.show_commands},
    "errors.md": {"tree": _draw_errors},
}
SLOW_PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "models.md": {"families": models.list_families, "formats": models.list_formats, "refused": models.list_refused},
}
"""A minute or two; ``make families`` looks whether they are stale."""
PICTURES: Mapping[str, Callable[[], str]] = {"pictures/peers.svg": charts.draw_peers}


def should_be() -> dict[Path, str]:
    """Every page and picture that comes from the code, or has a part that does, as it should be, but slow parts."""
    return {DOCS / name: draw() for name, draw in PICTURES.items()} | filled(PARTS)


def filled(pages: Mapping[str, Mapping[str, Callable[[], str]]]) -> dict[Path, str]:
    """*pages* with their parts as they should be."""
    made = {}
    for page, parts in pages.items():
        text = (DOCS / page).read_text("utf-8")
        for name, write in parts.items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            assert text.count(begin) == text.count(end) == 1, f"{page} has no place for {name!r}: {begin} … {end}"
            head, rest = text.split(begin)
            text = f"{head}{begin}\n\n{write()}\n\n{end}{rest.split(end)[1]}"
        made[DOCS / page] = text
    return made
