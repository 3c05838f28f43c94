"""The bars of the README: the table of peers in docs/figures.md, as a picture.

A chart is written by hand rather than by matplotlib, so that the same figures give the same bytes everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FIGURES = Path(__file__).parent.parent / "figures.md"
WIDTH, LABELS, BAR, GAP, TOP = 760, 310, 22, 12, 34
OURS, OTHERS = "#4477aa", "#9aa5b1"


def read_table(heading: str) -> list[list[str]]:
    """The first table below *heading* in the page of figures: its rows, cells without their markup."""
    section = FIGURES.read_text("utf-8").split(f"## {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.M)
    assert table is not None, f"no table below {heading!r}"
    rows = [line.strip("|").split("|") for line in table[0].splitlines()]
    return [[re.sub(r"[*`]", "", cell).strip() for cell in row] for row in rows[:1] + rows[2:]]


def draw_peers() -> str:
    """Seconds for each further token, one bar for each runner."""
    header, *rows = read_table("Beside others")
    column = header.index("each further token")
    ours = rows[0][0].split(",")[0]  # its budget is in the title
    named = [ours, *(row[0] for row in rows[1:])]
    seconds = [float(row[column].removesuffix("s")) for row in rows]
    title = "Seconds for each token: Llama-3.2-3B's shape, bf16, 7.2 GB, within 3 GiB"
    return bars(title, list(zip(named, seconds, strict=True)))


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """An SVG with a bar for each of *values*; the first one is ours."""
    longest = max(value for _, value in values)
    height = TOP + len(values) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-weight="bold" fill="#222222">{escape(title)}</text>',
    ]
    for index, (label, value) in enumerate(values):
        top = TOP + index * (BAR + GAP)
        length = round((WIDTH - LABELS - 70) * value / longest)
        weight = ' font-weight="bold"' if index == 0 else ""
        lines += [
            f'<text x="{LABELS - 8}" y="{top + 16}" text-anchor="end" fill="#222222"{weight}>{escape(label)}</text>',
            f'<rect x="{LABELS}" y="{top}" width="{length}" height="{BAR}" rx="2" fill="{OTHERS if index else OURS}"/>',
            f'<text x="{LABELS + length + 6}" y="{top + 16}" fill="#222222"{weight}>{value:g} s</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
