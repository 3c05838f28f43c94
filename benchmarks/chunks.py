"""Which chunk size: tokens that are reused, and what sweeps take, on prompts as retrieval makes them.

    python -m benchmarks.chunks MODEL [--memory 2300MiB] [--cgroup 3GiB]

A chunk is what is computed as one row block and what a page holds: smaller ones reuse more of a prompt (only whole
pages are), larger ones compute faster. Each size is a process of its own: contexts of 300 to 3,000 tokens, a first
question on each and then a second one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.prefix import QUESTION_TOKENS, ask, draw

SIZES = (64, 128, 256)
LENGTHS = (300, 700, 1500, 3000)


def main() -> None:
    """Run a child per size, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="2300MiB")
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    parts: dict[str, Any] = {}
    for size in SIZES:
        print(f"{size} …", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.chunks", *sys.argv[1:], "--child", str(size)]
        parts[str(size)] = bench.run_child(command, options.cgroup)
    report(parts)
    print("written to", bench.save("chunks", {"model": options.model.name, **parts}, options.json))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Cold and warm answers with one chunk size, and bytes on disk."""
    from layerstream import KVStoreConfig, LayerStream

    with tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        store = KVStoreConfig(folder, max_bytes="40GiB", min_free_bytes=0)
        with LayerStream(
            options.model, memory=options.memory, kv_store=store, chunk_tokens=options.child, progress=False
        ) as engine:
            ask(engine, draw(0, 40), QUESTION_TOKENS)
            found = {}
            for length in LENGTHS:
                context = draw(length, length)
                found[str(length)] = [ask(engine, context, number) for number in (1, 2)]
            single = [ask(engine, [], 50 + index)["first_token_seconds"] for index in range(3)]
        return {"answers": found, "question_alone": single}


def report(parts: dict[str, Any]) -> None:
    """The table."""
    rows = []
    for size, part in parts.items():
        answers = part["answers"]
        total = sum(int(length) + QUESTION_TOKENS for length in answers)
        reused = sum(pair[1]["cached_tokens"] for pair in answers.values())
        cold = sum(pair[0]["first_token_seconds"] for pair in answers.values())
        warm = [pair[1]["first_token_seconds"] for pair in answers.values()]
        rows.append(
            [
                size,
                f"{reused:,} of {total:,}",
                f"{cold:.1f}",
                f"{sum(warm):.2f}",
                f"{statistics.median(part['question_alone']):.2f}",
            ]
        )
    bench.show(
        f"Chunk sizes, contexts of {', '.join(map(str, LENGTHS))} tokens",
        ["chunk", "tokens reused", "cold, s", "warm, s", "question alone, s"],
        rows,
        "seconds to the first token, summed over the contexts",
    )


if __name__ == "__main__":
    main()
