"""What the prefix store saves: time to first token of a context and a question, cold and warm.

    python -m benchmarks.prefix MODEL [--memory 2300MiB] [--cgroup 3GiB] [--lengths 512 1024 4096 8192]

MODEL is a folder with a model larger than the memory. Each child is a process of its own in the cgroup:

1. *off*: cold, without a store (its memory goes to resident weights, so it streams a little less);
2. *on*: cold, with an empty store; then more questions on each context, warm in the same process;
3. *new*: a new process, the store of the one before: the question alone, which is the sweep that a warm answer cannot
   do without, and then a question on each context.

Contexts are drawn anew for every length and share no page.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import bench

QUESTION_TOKENS = 64
ANSWER_TOKENS = 4
REPEATS = 3
LENGTHS = (512, 1024, 4096, 8192)


def main() -> None:
    """Run the children, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="2300MiB", help="the engine's budget (default: %(default)s)")
    parser.add_argument("--cgroup", default="3GiB", help="limit of the process, page cache included")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="context tokens (default: %(default)s)")
    parser.add_argument("--chunk", type=int, help="tokens per page")
    parser.add_argument("--compression", default="none", choices=("none", "int8", "fp8"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("off", "on", "new"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="layerstream-kv-", dir=options.model.parent) as folder:
        for child in ("off", "on", "new"):
            print(f"{child} …", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.prefix", *sys.argv[1:], "--child", child]
            parts[child] = bench.run_child([*command, "--store", f"{folder}/kv"], options.cgroup)
            path = bench.save("prefix", {"model": options.model.name, **parts}, options.json)
    report(parts)
    print("written to", path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one child measures."""
    from layerstream import KVStoreConfig, LayerStream

    config = KVStoreConfig(options.store, max_bytes="40GiB", min_free_bytes=0, compression=options.compression)
    uses_store = options.child in ("on", "new")
    with LayerStream(
        options.model,
        memory=options.memory,
        kv_store=config if uses_store else None,
        chunk_tokens=options.chunk,
        max_context=max(options.lengths) + 256,
        progress=False,
    ) as engine:
        started = time.perf_counter()
        while engine.stats().kv.state == "hashing":  # once per model file; said in the table
            time.sleep(0.05)
        hashing = time.perf_counter() - started
        ask(engine, draw(0, 40), QUESTION_TOKENS)  # the first sweep learns the order of the units
        found: dict[str, Any] = {"alone": [ask(engine, [], 100 + index) for index in range(2 * REPEATS)]}
        for length in options.lengths:
            if options.child == "off" and length + QUESTION_TOKENS + ANSWER_TOKENS > engine.context_length:
                continue  # KV that the memory cannot hold needs a store to stream from
            context = draw(length, length)
            found[str(length)] = [ask(engine, context, 9 if options.child == "new" else 1)]
            if options.child == "on":
                found[f"{length} warm"] = [ask(engine, context, 2 + index) for index in range(REPEATS)]
        stats = engine.stats()
        flushed = time.perf_counter()
    return {
        "hashing_seconds": hashing,
        "close_seconds": time.perf_counter() - flushed,
        "answers": found,
        "kv": {name: getattr(stats.kv, name) for name in type(stats.kv).__slots__},
        "kv_token_bytes": engine.plan.facts.kv_token_bytes,
        "page_tokens": engine.plan.page_tokens,
        "max_sweep_tokens": engine.plan.max_sweep_tokens,
        "streamed_bytes": engine.plan.streamed_bytes,
        "seconds_per_sweep": stats.sweep_seconds / stats.sweeps,
        "disk_bytes": sum(path.stat().st_size for path in options.store.rglob("*.kv")) if uses_store else 0,
    }


def ask(engine: Any, context: list[int], question: int) -> dict[str, Any]:
    """One answer: what it took, and its tokens."""
    from layerstream import SamplingParams

    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    completion = engine.generate([context + draw(QUESTION_TOKENS, 1_000_000 + question)], params)[0]
    return {
        "first_token_seconds": completion.metrics.first_token_seconds,
        "seconds": completion.metrics.seconds,
        "cached_tokens": completion.usage.cached_tokens,
        "loaded_tokens": completion.metrics.loaded_tokens,
        "token_ids": completion.token_ids,
        "question": question,
    }


def draw(length: int, seed: int) -> list[int]:
    """Token ids that any vocabulary of a thousand has."""
    rng = random.Random(seed)
    return [rng.randrange(5, 900) for _ in range(length)]


def report(parts: dict[str, Any]) -> None:
    """The tables."""
    sweep = _median(parts["new"]["answers"]["alone"])
    rows = []
    for length in [name for name in parts["new"]["answers"] if name.isdigit()]:
        on, same, new = (
            _median(parts[part]["answers"][name])
            for part, name in (("on", length), ("on", f"{length} warm"), ("new", length))
        )
        off = _median(parts["off"]["answers"][length]) if length in parts["off"]["answers"] else None
        rows.append(
            [
                length,
                "-" if off is None else f"{off:.2f}",
                f"{on:.2f}",
                "-" if off is None else f"{on / off:.2f}",
                f"{same:.2f}",
                f"{new:.2f}",
                f"{new / sweep:.2f}",
                f"{(off or on) / new:.1f}",
                str(parts["new"]["answers"][length][0]["loaded_tokens"]),
            ]
        )
    bench.show(
        f"Seconds to the first token of a context and {QUESTION_TOKENS} more tokens",
        ["context", "cold, off", "cold, on", "on/off", "warm", "new process", "x sweep", "cold/warm", "loaded"],
        rows,
        f"the sweep with the question alone: {sweep:.2f} s",
    )
    on = parts["on"]
    pages = on["kv"]["written_pages"]
    theory = pages * on["page_tokens"] * on["kv_token_bytes"]
    bench.show(
        "On disk",
        ["pages", "bytes", "of the theoretical size", "digest of the weights, s", "close, s"],
        [
            [
                str(pages),
                bench.gib(on["disk_bytes"]),
                f"{on['disk_bytes'] / max(theory, 1):.4f}",
                f"{on['hashing_seconds']:.1f}",
                f"{on['close_seconds']:.2f}",
            ]
        ],
    )


def _median(answers: Any) -> float:
    return statistics.median(answer["first_token_seconds"] for answer in answers)


if __name__ == "__main__":
    main()
