"""A mixture of experts: what a sweep reads of it, how fast, and how often what it wants is in memory.

    python -m benchmarks.grow Qwen3-30B-A3B MODEL --quantization int4 --skew 1.0
    python -m benchmarks.experts MODEL [--memory 3GiB 6GiB] [--rows 1 4 16] [--json FILE]

Questions about held-out contexts, greedy, counted right only if the answer is the right one to the letter; as many at
once as there are rows. What is shown is of sweeps that decode; those of prompts are left out by asking the same for one
token first. Of every sweep the experts that its rows were routed to are recorded. Beside it:

- *read*: bytes of experts that were read, and that as a share of what was routed to and not in memory, each once;
- *raw*: a direct read of as many bytes in reads of the same sizes, from the same files, in the same run;
- *compute*: the same sweep when nothing has to be read: the seconds of a sweep less those that it waited;
- the hit rate of the cache, and what LRU, the best fixed set and a clairvoyant (Belady's MIN) would have had in as many
  slots, on the recorded requests.

A part of its own draws routings by Zipf's law and compares the same caches on them, without a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.large import draw_questions
from benchmarks.routings import clairvoyant_hits, draw_routing, lru_hits, requests, static_hits

MAX_TOKENS = 12
FACTS = 2
EXPONENTS = (0.0, 1.0, 1.4)
ALONE = 3  # questions that are asked one after the other
SHARES = (0.125, 0.25, 0.5)


def main() -> None:
    """Run the children, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", nargs="+", default=["3GiB"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speculation", default="off")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    result: dict[str, Any] = {"model": options.model.name, "routings": compare_caches(), "runs": []}
    for memory in options.memory:
        command = [sys.executable, "-m", "benchmarks.experts", str(options.model), "--child", "--memory", memory]
        command += ["--rows", *map(str, options.rows), "--speculation", options.speculation]
        bench.drop_file_cache(options.model)
        result["runs"].append({"memory": memory, **bench.run_child(command)})
        bench.save("experts", result, options.json)
    report(result)


def compare_caches() -> list[dict[str, float]]:
    """Hit rates on drawn routings: Qwen3-30B-A3B's experts, of twelve layers."""
    from layerstream.streaming.expert_cache import ExpertCache

    found = []
    for exponent in EXPONENTS:
        routing = draw_routing(num_layers=12, num_experts=128, top_k=8, num_sweeps=800, exponent=exponent)
        asked = requests(routing, 128)
        for share in SHARES:
            slots = int(share * 12 * 128)
            cache = ExpertCache(slots, 12 * 128, chosen=12 * 8)
            for sweep in routing:
                cache.begin_sweep()
                for layer, chosen in enumerate(sweep):
                    wanted = sorted(layer * 128 + int(expert) for expert in chosen)
                    for expert in cache.want(wanted, [1.0] * len(wanted)):
                        if not cache.is_there(expert) and cache.place(expert) is not None:
                            cache.let_go(expert)
            found.append(
                {
                    "exponent": exponent,
                    "share": share,
                    "ours": cache.hits / (cache.hits + cache.misses),
                    "lru": lru_hits(asked, slots),
                    "static": static_hits(asked, slots),
                    "clairvoyant": clairvoyant_hits(asked, slots),
                }
            )
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One budget, all numbers of rows."""
    from layerstream import LayerStream
    from layerstream.streaming.expert_bank import ExpertBank
    from transformers import AutoTokenizer

    recorded: list[list[int]] = []
    want = ExpertBank.want

    def noted(bank: ExpertBank, experts: Any, shares: Any) -> None:
        recorded.append(list(experts))
        want(bank, experts, shares)

    ExpertBank.want = noted  # type: ignore[method-assign]
    asked = draw_questions(AutoTokenizer.from_pretrained(options.model), FACTS, max(ALONE, *options.rows))
    started = time.perf_counter()
    with LayerStream(
        options.model,
        device="cpu",
        memory=options.memory[0],
        kv_store=None,
        speculation=options.speculation,
        progress=False,
    ) as engine:
        ready = time.perf_counter() - started
        print(engine.plan, file=sys.stderr)
        _ask(engine, asked[:1], 2)
        runs = []
        for rows in options.rows:
            groups = [asked[at : at + rows] for at in range(0, max(ALONE, rows), rows)]
            runs.append(_measure_rows(engine, groups, rows, recorded))
        plan, stats = engine.plan, engine.stats()
        bank = engine._parts.weights.bank
        assert bank is not None
        return {
            "ready_seconds": ready,
            "slots": plan.weights.expert_slots,
            "num_experts": plan.facts.num_experts,
            "expert_bytes": plan.facts.mean_expert_bytes,
            "dense_bytes": plan.weights.streamed_bytes,
            "peak_memory_bytes": stats.peak_memory_bytes,
            "raw": _raw_rate(engine, recorded),
            "runs": runs,
        }


def _measure_rows(engine: Any, groups: list[Any], rows: int, recorded: list[list[int]]) -> dict[str, Any]:
    """Answers of *rows* questions at once, less the same with one token each."""
    short = [_ask(engine, group, 1) for group in groups]
    recorded.clear()
    plan = engine.plan
    predicted = engine._parts.weights.experts.expected_missing(rows) * plan.facts.mean_expert_bytes
    long = [_ask(engine, group, MAX_TOKENS) for group in groups]
    total = {key: sum(run[key] for run in long) - sum(run[key] for run in short) for key in long[0]}
    trace = [expert for experts in recorded for expert in experts]
    slots = plan.weights.expert_slots
    sweeps = total["sweeps"]
    return {
        "rows": rows,
        "right": sum(run["right"] for run in long),
        "questions": sum(map(len, groups)),
        "sweeps": sweeps,
        "tokens": total["tokens"],
        "sweep_seconds": total["seconds"] / sweeps,
        "wait_seconds": total["waited"] / sweeps,
        "wanted": (total["hits"] + total["misses"]) / sweeps,
        "missed": total["misses"] / sweeps,
        "read_bytes": total["expert_bytes"] / sweeps,
        "dense_bytes": (total["bytes"] - total["expert_bytes"]) / sweeps,
        "predicted_bytes": predicted,
        "planned_bytes": plan.expert_read_bytes(rows),
        "hit_rate": total["hits"] / max(1, total["hits"] + total["misses"]),
        "trace": {
            "requests": len(trace),
            "lru": lru_hits(trace, slots),
            "static": static_hits(trace, slots),
            "clairvoyant": clairvoyant_hits(trace, slots),
        },
    }


def _ask(engine: Any, group: list[tuple[list[int], list[int]]], max_tokens: int) -> dict[str, Any]:
    from layerstream import SamplingParams

    before = engine.stats()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with engine.gang(len(group)):
        requests = [engine.submit(prompt, params) for prompt, _ in group]
    completions = [request.result() for request in requests]
    after = engine.stats()
    return {
        "right": sum(c.token_ids[: len(answer)] == answer for c, (_, answer) in zip(completions, group, strict=True)),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "sweeps": after.sweeps - before.sweeps,
        "seconds": after.sweep_seconds - before.sweep_seconds,
        "waited": after.wait_seconds - before.wait_seconds,
        "hits": after.experts.hits - before.experts.hits,
        "misses": after.experts.misses - before.experts.misses,
        "bytes": after.weight_bytes_streamed - before.weight_bytes_streamed,
        "expert_bytes": after.experts.streamed_bytes - before.experts.streamed_bytes,
    }


def _raw_rate(engine: Any, recorded: list[list[int]]) -> float:
    """Bytes per second of direct reads of recorded experts, as many at a time as the bank has under way."""
    from layerstream.streaming.expert_bank import AHEAD_BYTES
    from layerstream.streaming.loader import Countdown
    from layerstream.streaming.reader import DirectReader
    from layerstream.streaming.ring import Arena

    layout = engine._parts.weights.bank._layout
    wanted = [expert for experts in recorded for expert in experts][-1500:]
    layouts = [layout(expert) for expert in wanted]
    size = max(layout.num_bytes for layout in layouts)
    at_once = max(1, AHEAD_BYTES // size)
    reader, arena = DirectReader(), Arena(at_once * size)
    rates = []
    try:
        for first in range(0, len(layouts), at_once):
            group = layouts[first : first + at_once]
            countdown = Countdown(sum(len(layout.requests) for layout in group))
            started = time.perf_counter()
            for slot, layout in enumerate(group):
                for request in layout.requests:
                    reader.submit(request, arena.view, slot * size, countdown)
            countdown.wait()
            rates.append(sum(layout.weight_bytes for layout in group) / (time.perf_counter() - started))
    finally:
        reader.close()
    return statistics.median(rates)


def report(result: dict[str, Any]) -> None:
    """The tables."""
    rows = [
        [
            f"Zipf {found['exponent']}" if found["exponent"] else "uniform",
            f"{found['share']:.0%}",
            *(f"{found[name]:.1%}" for name in ("ours", "lru", "static", "clairvoyant")),
        ]
        for found in result["routings"]
    ]
    bench.show("hit rates on drawn routings", ["", "slots", "ours", "LRU", "best fixed set", "clairvoyant"], rows)
    for run in result["runs"]:
        rows = []
        for found in run["runs"]:
            routed = found["missed"] * run["expert_bytes"]
            compute = found["sweep_seconds"] - found["wait_seconds"]
            limit = max((found["read_bytes"] + found["dense_bytes"]) / run["raw"], compute)
            rows.append(
                [
                    str(found["rows"]),
                    f"{found['right']} of {found['questions']}",
                    f"{found['wanted']:.0f}",
                    f"{found['read_bytes'] / 1e6:.0f}",
                    f"{found['read_bytes'] / max(routed, 1):.3f}",
                    f"{found['predicted_bytes'] / 1e6:.0f}",
                    f"{found['sweep_seconds']:.3f}",
                    f"{compute:.3f}",
                    f"{found['sweep_seconds'] / limit:.2f}",
                    f"{found['sweep_seconds'] * found['sweeps'] / found['tokens']:.3f}",
                    f"{found['hit_rate']:.1%}",
                    *(f"{found['trace'][name]:.1%}" for name in ("lru", "static", "clairvoyant")),
                ]
            )
        heads = ["rows", "right", "wanted", "read MB", "of missed", "predicted", "s/sweep", "compute", "of limit"]
        heads += ["s/token", "hits", "LRU", "fixed", "MIN"]
        title = f"{result['model']} in {run['memory']}: {run['slots']:,} of {run['num_experts']:,} experts"
        bench.show(title, heads, rows, f"raw reads {run['raw'] / 1e9:.2f} GB/s; ready in {run['ready_seconds']:.1f} s")


if __name__ == "__main__":
    main()
