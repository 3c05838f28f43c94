"""What recurrent layers cost beside attention in their place: prompts, decode sweeps, bytes of state.

    python -m benchmarks.recurrent SHAPE [--layers 8] [--work FOLDER] [--memory 8GiB] [--device cpu]

SHAPE is one of benchmarks.random_checkpoint's with recurrent layers. Its first layers are written with random weights
twice: as they are (*hybrid*), and with attention in all layers (*attention*). Both answer the same prompts in one
process after the other, resident by default, so that compute alone is measured: prompts of 512 and 4,096 tokens, and
decode sweeps of 1, 8 and 32 sequences. With ``--memory`` below the model's size weights stream, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from layerstream.core.sizes import format_size

from benchmarks import bench
from benchmarks.random_checkpoint import SHAPES, write

PROMPTS = (512, 4096)
SEQUENCES = (1, 8, 32)
DECODED = 12  # tokens of each sequence
KINDS = ("hybrid", "attention")


def main() -> None:
    """Write the checkpoints, run a child for each, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[name for name in SHAPES if name.startswith("Qwen3.")])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    parts: dict[str, Any] = {}
    for kind in KINDS:
        folder = options.work / f"{options.shape}-{options.layers}-{kind}"
        if not (folder / "config.json").is_file():
            shape = dict(SHAPES[options.shape])
            if kind == "attention":
                shape["layer_types"] = ["full_attention"] * shape["num_hidden_layers"]
            write(shape, folder, options.layers)
        print(f"{kind} …", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.recurrent", *sys.argv[1:], "--child", str(folder)]
        parts[kind] = bench.run_child(command)
    report(parts)
    path = bench.save("recurrent", {"shape": options.shape, "layers": options.layers, **parts}, options.json)
    print("written to", path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of prompts and of decode sweeps, and bytes of a sequence's state."""
    from layerstream import LayerStream, SamplingParams

    with LayerStream(
        options.child, memory=options.memory, device=options.device, kv_store=None, speculation="off", progress=False
    ) as engine:
        first = SamplingParams(max_tokens=1, ignore_eos=True)
        engine.generate([_draw(64, 0)], first)
        found: dict[str, Any] = {"state_bytes": engine.plan.facts.state_bytes, "slots": engine.plan.num_slots}
        for length in PROMPTS:
            seconds = []
            for turn in range(3 if length < 1000 else 1):
                started = time.perf_counter()
                engine.generate([_draw(length, turn + 1)], first)
                seconds.append(time.perf_counter() - started)
            found[f"prompt {length}"] = statistics.median(seconds)
        for count in SEQUENCES:
            prompts = [_draw(20, 100 + number) for number in range(count)]
            before = engine.stats()
            started = time.perf_counter()
            engine.generate(prompts, SamplingParams(max_tokens=DECODED, ignore_eos=True))
            seconds, after = time.perf_counter() - started, engine.stats()
            sweeps = after.sweeps - before.sweeps
            found[f"decode {count}"] = {"sweep_seconds": seconds / sweeps, "sweeps": sweeps}
        return found


def report(parts: dict[str, Any]) -> None:
    """The table."""
    hybrid, attention = (parts[kind] for kind in KINDS)
    rows = []
    for length in PROMPTS:
        pair = [part[f"prompt {length}"] for part in (hybrid, attention)]
        rows.append([f"prompt of {length} tokens", *(f"{s:.2f} s" for s in pair), f"{pair[0] / pair[1]:.2f}"])
    for count in SEQUENCES:
        pair = [part[f"decode {count}"]["sweep_seconds"] for part in (hybrid, attention)]
        name = f"decode sweep of {count} sequences"
        rows.append([name, *(f"{s * 1e3:.0f} ms" for s in pair), f"{pair[0] / pair[1]:.2f}"])
    bench.show("recurrent layers", ["", *KINDS, "ratio"], rows)
    print(f"state of a sequence: {format_size(hybrid['state_bytes'])}, {hybrid['slots']} slots")


def _draw(length: int, seed: int) -> list[int]:
    import random

    chance = random.Random(seed)
    return [chance.randrange(10, 5000) for _ in range(length)]


if __name__ == "__main__":
    main()
