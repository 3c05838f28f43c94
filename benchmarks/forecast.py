"""What plans promise beside what is measured: seconds per sweep, seconds to the first token, memory of the process.

    python -m benchmarks.forecast MODEL:MEMORY [MODEL:MEMORY …] [--device cuda] [--context 400] [--json FILE]

Every configuration runs in a process of its own, after this machine's rates were measured anew. A sweep is that of one
sequence that decodes, without guesses (median of several); the first token is that of a prompt of CONTEXT tokens, none
of it stored. The process's memory is its peak of resident pages; on an accelerator, what torch reserved there as well.
The disk's rate is measured between the sweeps, because shared disks change theirs from one second to the next; the
forecast is made with the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bench

ROUNDS = 3
SWEEPS = 3
CLOSE = 0.2


def main() -> None:
    """Run all configurations, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="MODEL:MEMORY")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--host-memory")
    parser.add_argument("--context", type=int, default=400)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.runs[0], options)))
        return
    results = []
    for run in options.runs:
        print(f"{run} …", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.forecast", run, "--child", "--device", options.device]
        command += ["--context", str(options.context)]
        command += ["--host-memory", options.host_memory] if options.host_memory else []
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        results.append({"run": run, **json.loads(done.stdout.splitlines()[-1])})
        bench.save("forecast", {"runs": results}, options.json)
    report(results)


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Predict one configuration, then run it."""
    import torch
    from layerstream import LayerStream, SamplingParams
    from layerstream.core.sizes import parse_size
    from layerstream.hardware.accelerators import resolve_device
    from layerstream.measuring.rates import measure_disk, rates_for, weights_file
    from layerstream.planner.forecast import Forecast
    from layerstream.setup.config import EngineConfig
    from layerstream.setup.plan_model import plan_model

    model, _, memory = run.rpartition(":")
    host = None if options.host_memory is None else parse_size(options.host_memory)
    config = EngineConfig(
        model, device=options.device, memory_bytes=parse_size(memory), host_memory_bytes=host, speculation="off"
    )
    plan, skeleton, _ = plan_model(config)
    file = weights_file(skeleton)
    rates = rates_for(skeleton, resolve_device(options.device))
    disk = [measure_disk(file)]
    with LayerStream(
        model, device=options.device, memory=memory, host_memory=options.host_memory, kv_store=None, speculation="off"
    ) as engine:
        prompt = [3 + token % 200 for token in range(options.context)]
        engine.generate([prompt[:3]], SamplingParams(max_tokens=2, ignore_eos=True))
        decode = []
        for _ in range(ROUNDS):
            decode.append(_sweep(engine))
            disk.append(measure_disk(file))
        started = time.perf_counter()
        engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        first = time.perf_counter() - started
        stats = engine.stats()
    disk.append(measure_disk(file))
    rates = dataclasses.replace(rates, disk=statistics.median(disk))
    forecast = Forecast(plan, rates, str(skeleton.dtype).removeprefix("torch."), options.context)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "disk": [min(disk), statistics.median(disk), max(disk)],
        "bound_by": forecast.bound_by,
        "read_bytes": plan.disk_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "sweep": [forecast.sweep_seconds, statistics.median(decode)],
        "first": [forecast.cold_seconds, first],
        "process": [forecast.used_bytes, peak],
        "bits": stats.bits_per_weight,
    }
    if torch.cuda.is_available() and plan.host is not None:
        found["device"] = [plan.planned_bytes, torch.cuda.max_memory_reserved()]
    return found


def _sweep(engine: Any) -> float:
    """Seconds of one decoding sweep, in the middle of an answer: those of a short answer less those of its prompt."""
    from layerstream import SamplingParams

    seconds = []
    for max_tokens in (1, 1 + SWEEPS):
        before = engine.stats().sweep_seconds
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        seconds.append(engine.stats().sweep_seconds - before)
    return (seconds[1] - seconds[0]) / SWEEPS


def report(results: list[dict[str, Any]]) -> None:
    """The table."""
    rows = []
    for result in results:
        row = [result["run"].rpartition("/")[2], result["bound_by"], "/".join(f"{r / 1e9:.1f}" for r in result["disk"])]
        for name, unit, digits in (("sweep", 1.0, 3), ("first", 1.0, 2), ("process", 2**30, 2)):
            predicted, measured = (value / unit for value in result[name])
            error = predicted / measured - 1
            row += [f"{predicted:.{digits}f}", f"{measured:.{digits}f}", f"{error:+.0%}" + "*" * (abs(error) > CLOSE)]
        rows.append(row)
    heads = ["run", "bound by", "disk GB/s"]
    heads += [
        f"{name}{part}" for name in ("sweep s", "first token s", "process GiB") for part in (" plan", " real", "")
    ]
    bench.show("predicted and measured", heads, rows)


if __name__ == "__main__":
    main()
