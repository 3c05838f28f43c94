"""Whether guesses ever cost time in a mixture of experts, where every row brings experts of its own.

    python -m benchmarks.grow Qwen3-30B-A3B MODEL --quantization int4 --skew 1.0
    python -m benchmarks.guesses MODEL [--memory 6GiB] [--rows 1 8] [--turns 6] [--json FILE]

One engine answers the same questions with guesses and without, in turns, so that a disk that slows down slows both.
Shown are seconds per token of sweeps in which all rows decode, and how many tokens a sweep brought.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.experts import FACTS, _ask
from benchmarks.large import draw_questions

MAX_TOKENS = 24


def main() -> None:
    """Ask in turns, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    rows = []
    for count, turns in found.items():
        ratios = [on / off for on, off in zip(turns["on"], turns["off"], strict=True)]
        rows.append(
            [
                str(count),
                f"{statistics.mean(turns['off']):.3f}",
                f"{statistics.mean(turns['on']):.3f}",
                f"{sum(turns['on']) / sum(turns['off']):.3f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{turns['tokens'] / turns['sweeps']:.2f}",
                str(turns["declined"]),
            ]
        )
    heads = ["answers at once", "s/token off", "on", "on/off", "of turns", "tokens/sweep on", "declined"]
    bench.show(f"{options.model.name} in {options.memory}", heads, rows)
    print("written to", bench.save("guesses", {"model": options.model.name, "turns": found}, options.json))


def measure(options: argparse.Namespace) -> dict[int, Any]:
    """For each number of answers at once: seconds per token, turn by turn."""
    from layerstream import LayerStream
    from layerstream.scheduling.drafting.trees import TreeDrafting
    from transformers import AutoTokenizer

    asked = draw_questions(AutoTokenizer.from_pretrained(options.model), FACTS, max(options.rows) + options.turns)
    propose, guesses = TreeDrafting.propose, True

    def proposed(drafting: TreeDrafting, *arguments: Any) -> Any:
        return propose(drafting, *arguments) if guesses else {}

    TreeDrafting.propose = proposed  # type: ignore[method-assign]
    clock = Clock()
    found = {}
    with LayerStream(options.model, device="cpu", memory=options.memory, kv_store=None, progress=clock) as engine:
        _ask(engine, asked[:1], MAX_TOKENS)
        for rows in options.rows:
            turns: dict[str, Any] = {"off": [], "on": [], "tokens": 0, "sweeps": 0}
            before = engine.stats().declined_drafts
            for turn in range(options.turns):
                for way in ("off", "on") if turn % 2 else ("on", "off"):
                    guesses = way == "on"
                    clock.clear()
                    _ask(engine, asked[turn : turn + rows], MAX_TOKENS)
                    turns[way].append(clock.seconds / clock.tokens)
                    if guesses:
                        turns["tokens"] += clock.tokens
                        turns["sweeps"] += clock.sweeps
            turns["declined"] = engine.stats().declined_drafts - before
            found[rows] = turns
            print(f"{rows} …", file=sys.stderr)
    return found


class Clock:
    """Adds up sweeps in which all rows decode; called with the engine's events."""

    def __init__(self) -> None:
        self._decodes = False
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.seconds, self.tokens, self.sweeps = 0.0, 0, 0

    def __call__(self, event: Any) -> None:
        name = type(event).__name__
        if name == "SweepStarted":
            self._decodes = event.num_tokens == event.num_sequences
        elif name == "SweepFinished" and self._decodes:
            self.seconds += event.seconds
            self.tokens += event.tokens_out
            self.sweeps += 1


if __name__ == "__main__":
    main()
