"""Thirty-two requests at once against the same requests one after the other, and against the one-token sweep.

    python -m benchmarks.batch MODEL [--cgroup 3GiB] [--memory 2300MiB] [--requests 32] [--tokens 64] [--alone 2]

Prompts of 16 random tokens, every answer as long as it may be (ignore_eos), no guesses. One after the other is measured
on the first few requests, each in full; the others would take as long. Every run is a process of its own in a memory
cgroup, page cache included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from layerstream import LayerStream, SamplingParams
from layerstream.api.events import Event, SweepFinished, SweepStarted

from benchmarks import bench

PROMPT_TOKENS = 16


def child(options: argparse.Namespace) -> None:
    """Run *options.child* requests at once, or, if it is 1, ``alone`` of them in turn; print the figures."""
    rng = random.Random(1)
    prompts = [[rng.randrange(1000, 30_000) for _ in range(PROMPT_TOKENS)] for _ in range(options.requests)]
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    rows: list[int] = []
    seconds: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, SweepStarted):
            rows.append(event.num_tokens)
        if isinstance(event, SweepFinished):
            seconds.append(event.seconds)

    with LayerStream(options.model, memory=options.memory, kv_store=None, speculation="off", progress=listen) as engine:
        engine.generate([prompts[0][:1]], SamplingParams(max_tokens=1))
        started = time.perf_counter()
        if options.child == 1:
            completions = [engine.generate([prompt], params)[0] for prompt in prompts[: options.alone]]
        else:
            completions = engine.generate(prompts, params)
        elapsed = time.perf_counter() - started
        stats = engine.stats()
    decoding = [second for count, second in zip(rows, seconds, strict=True) if count == options.child]
    figures = {
        "requests": len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "seconds": elapsed,
        "decode_sweep_seconds": statistics.median(decoding),
        "first_tokens": [completion.token_ids[:8] for completion in completions[: options.alone]],
        "peak_memory_bytes": stats.peak_memory_bytes,
    }
    print("\n" + json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cgroup", default="3GiB")
    parser.add_argument("--memory", default="2300MiB")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=2, help="requests that are run one after the other")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    results: dict[str, Any] = {}
    for name, count in (("one after the other", 1), ("at once", options.requests)):
        command = [sys.executable, "-m", "benchmarks.batch", *sys.argv[1:], "--child", str(count)]
        results[name] = bench.run_child(command, options.cgroup)
    alone, together = results["one after the other"], results["at once"]
    rates = {name: result["tokens"] / result["seconds"] for name, result in results.items()}
    rows = [
        [
            name,
            str(result["requests"]),
            f"{result['seconds']:.1f}",
            f"{rates[name]:.2f}",
            f"{rates[name] / rates['one after the other']:.1f} x",
            f"{result['decode_sweep_seconds']:.2f}",
            f"{result['decode_sweep_seconds'] / alone['decode_sweep_seconds']:.2f} x",
            bench.gib(result["cgroup_peak"]),
        ]
        for name, result in results.items()
    ]
    columns = ("", "requests", "seconds", "tokens/s", "against one", "s/sweep", "against one", "cgroup peak")
    same = together["first_tokens"] == alone["first_tokens"]
    bench.show(
        f"{options.requests} requests of {options.tokens} new tokens: {options.model.name}",
        columns,
        rows,
        f"the first tokens of the requests that ran both ways are {'the same' if same else 'DIFFERENT'}",
    )
    print(bench.save("batch", {"results": results, "same": same}, options.json))


if __name__ == "__main__":
    main()
