"""The picture of one sweep: what the disk reads and what is computed meanwhile, of the demo's model within its budget.

    python -m docs.generate.sweep

runs the model and writes docs/pictures/sweep.svg. Its times are those of the machine that draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerstream.core.sizes import parse_size
from layerstream.measuring.plot import COLOURS, measure
from layerstream.planner.simulation import Step
from layerstream.setup.config import EngineConfig

PICTURE = Path(__file__).parent.parent / "pictures" / "sweep.svg"
MEMORY = "3600KiB"
WIDTH, LABELS, LANE, GAP, TOP = 760, 80, 26, 10, 34
ROWS = ("read", "compute")
ATTEMPTS = 5


def draw(steps: Sequence[Step]) -> str:
    """An SVG with a row for the disk and a row for the compute."""
    end = _seconds(steps)
    scale = (WIDTH - LABELS - 16) / end
    height = TOP + len(ROWS) * (LANE + GAP) + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-weight="bold" fill="#222222">One sweep of one token: demo, memory={MEMORY}</text>',
    ]
    for index, kind in enumerate(ROWS):
        top = TOP + index * (LANE + GAP)
        lines.append(f'<text x="{LABELS - 8}" y="{top + 18}" text-anchor="end" fill="#222222">{kind}</text>')
        for step in steps:
            start = max(step.start, 0.0)
            stop = min(step.stop, end)
            if step.kind == kind and stop > start:
                width = max((stop - start) * scale - 0.5, 0.5)
                lines.append(
                    f'<rect x="{LABELS + start * scale:.1f}" y="{top}" width="{width:.1f}" height="{LANE}" '
                    f'fill="{COLOURS[kind]}"/>'
                )
    lines.append(f'<text x="{LABELS}" y="{height - 8}" fill="#222222">0</text>')
    lines.append(f'<text x="{WIDTH - 16}" y="{height - 8}" text-anchor="end" fill="#222222">{end * 1000:.0f} ms</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _seconds(steps: Sequence[Step]) -> float:
    return max(step.stop for step in steps if step.kind == "compute")


def main() -> None:
    """Write the picture."""
    config = EngineConfig("demo", memory_bytes=parse_size(MEMORY))
    steps = min((measure(config) for _ in range(ATTEMPTS)), key=_seconds)  # the one that least else went on beside
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(steps), "utf-8")


if __name__ == "__main__":
    main()
