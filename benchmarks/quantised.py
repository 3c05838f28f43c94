"""Fewer bytes in every sweep: packing, sweeps of packed weights, and 4 bits that fit, beside llama.cpp.

    python -m benchmarks.quantised MODEL --work FOLDER --environments FOLDER [--only PART …] [--json FILE]

MODEL is a bf16 folder (``python -m benchmarks.grow 3B FOLDER``). Written to the work folder once: MODEL in nf4, int8
and int4, and as GGUF in Q4_0 by llama.cpp's quantiser, once with every matrix in Q4_0, once as it does by itself, with
the head in Q6_K. Parts:

1. *packing*: seconds, bytes and the most memory in a cgroup of 1 GiB;
2. *sweeps* with 1, 16, 64 and 256 tokens in 3 GiB, with so small a budget that nearly everything streams, against a
   raw direct read of the same bytes and the same tokens on resident weights;
3. *resident*: 3 GiB, everything in memory: the first token of a prompt of 512, and tokens of one and of eight
   sequences, beside llama.cpp on the Q4_0 files;
4. *streamed*: the Q4_0 file in a cgroup that it does not fit, seconds a token beside llama.cpp with mmap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.peers.environments import gguf_of, python_of
from benchmarks.sweep import SweepTimes, best_raw

KINDS = ("nf4", "int8", "int4")
PARTS = ("packing", "sweeps", "resident", "streamed")
STREAMING_MEMORY = "600MiB"
CGROUP = "3GiB"
RESIDENT_MEMORY = "2300MiB"
LARGER_CGROUP, LARGER_MEMORY = "4GiB", "3GiB"
SMALL_CGROUP, SMALL_MEMORY = "1536MiB", "800MiB"
PROMPT, NEW, BATCHES = 512, 16, (1, 8)
GGUF_TYPES = {"q4_0": (2, True), "q4_0-q6_k": (2, False)}
"""llama.cpp's number of the type, and whether every matrix is of it."""
PEERS = Path(__file__).parent / "peers"


def main() -> None:
    """Run the parts, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--environments", type=Path, required=True, help="where llama.cpp is, or is made")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("pack", "decode"), help=argparse.SUPPRESS)
    parser.add_argument("--argument", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "pack":
        print(json.dumps(_pack(options.model, options.work, options.argument)))
        return
    if options.child == "decode":
        print(json.dumps(_decode(options.model, options.argument)))
        return
    result: dict[str, Any] = {"model": options.model.name}
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "packing": measure_packing,
        "sweeps": measure_sweeps,
        "resident": measure_resident,
        "streamed": measure_streamed,
    }
    for name in options.only:
        print(f"{name} …", file=sys.stderr)
        result[name] = parts[name](options)
        path = bench.save("quantised", result, options.json)
    print("written to", path)


def measure_packing(options: argparse.Namespace) -> dict[str, Any]:
    """Pack what is not there yet, each kind in a process of its own."""
    found: dict[str, Any] = {}
    rows = []
    for kind in KINDS:
        note = options.work / f"{kind}.json"
        if not note.is_file():
            command = [sys.executable, "-m", "benchmarks.quantised", str(options.model), "--work", str(options.work)]
            command += ["--environments", str(options.environments), "--child", "pack", "--argument", kind]
            seconds = _read_seconds(options.model)
            note.write_text(json.dumps({**bench.run_child(command, "1GiB"), "read_seconds": seconds}))
        found[kind] = packed = json.loads(note.read_text())
        rows.append(
            [
                kind,
                f"{packed['seconds']:.0f}",
                f"{packed['source_bytes'] / packed['seconds'] / 1e6:.0f}",
                f"{packed['packed_bytes'] / packed['source_bytes']:.3f}",
                bench.gib(packed["cgroup_peak"]),
                f"{packed['read_seconds']:.0f}",
            ]
        )
    columns = ["", "seconds", "MB/s read", "of the bytes", "most memory in 1 GiB", "reading the source, s"]
    bench.show("Packing", columns, rows, "most memory: page cache included")
    return found


def _pack(model: Path, work: Path, kind: str) -> dict[str, Any]:
    from layerstream.setup.pack import pack

    started = time.perf_counter()
    report = pack(model, work / kind, kind)
    return {
        "seconds": time.perf_counter() - started,
        "source_bytes": report.source_bytes,
        "packed_bytes": report.packed_bytes,
    }


def _read_seconds(model: Path) -> float:
    bench.drop_file_cache(model)
    started, buffer = time.perf_counter(), bytearray(16 * 2**20)
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    seconds = time.perf_counter() - started
    bench.drop_file_cache(model)
    return seconds


def measure_sweeps(options: argparse.Namespace) -> dict[str, Any]:
    """Sweeps that stream nearly everything, of bf16 and of every kind."""
    found: dict[str, Any] = {}
    rows = []
    for kind in ("bf16", *KINDS):
        model = options.model if kind == "bf16" else options.work / kind
        arguments = [str(model), "--rounds", str(options.rounds), "--child"]
        command = [sys.executable, "-m", "benchmarks.sweep", *arguments]
        streamed = bench.run_child([*command, "streamed", "--memory", STREAMING_MEMORY], CGROUP)
        resident = bench.run_child([*command, "resident", "--memory", "0"])
        found[kind] = {"streamed": streamed, "resident": resident}
        raw = statistics.median(best_raw(streamed))
        whole = found["bf16"]["streamed"]
        cells = []
        for tokens, seconds in streamed["sweep_seconds"].items():
            compute = statistics.median(resident["sweep_seconds"][tokens])
            middle = statistics.median(seconds)
            cells.append(f"{middle:.2f} / {compute:.2f} = {middle / max(raw, compute):.2f}x")
        share = streamed["stored_bytes"] / whole["stored_bytes"]
        rows.append([kind, f"{share:.3f}", bench.gib(streamed["streamed_bytes"]), f"{raw:.2f}", *cells])
    columns = ["", "of bf16's bytes", "streamed", "raw read, s", *(f"{count} tokens" for count in (1, 16, 64, 256))]
    bench.show(
        "Sweeps", columns, rows, "seconds streamed / on resident weights = times the larger of that and the read"
    )
    return found


def measure_resident(options: argparse.Namespace) -> dict[str, Any]:
    """Everything in memory, beside llama.cpp."""
    files = _gguf_files(options)
    llama = python_of(options.environments, "llama")
    larger = _decode_command(options, files["q4_0-q6_k"], LARGER_MEMORY)
    runs: dict[str, tuple[list[str], str]] = {
        "LayerStream, int4": (_decode_command(options, options.work / "int4"), CGROUP),
        "LayerStream, Q4_0": (_decode_command(options, files["q4_0"]), CGROUP),
        "llama.cpp, Q4_0": (_llama_command(llama, files["q4_0"]), CGROUP),
        "LayerStream, Q4_0, head Q6_K": (_decode_command(options, files["q4_0-q6_k"]), CGROUP),
        f"the same in {LARGER_CGROUP}": (larger, LARGER_CGROUP),
        "llama.cpp, Q4_0, head Q6_K": (_llama_command(llama, files["q4_0-q6_k"]), CGROUP),
    }
    found = {name: bench.run_child(command, limit) for name, (command, limit) in runs.items()}
    rows = []
    for name, figures in found.items():
        steps = [statistics.median(figures["step_seconds"][str(batch)]) for batch in BATCHES]
        first = statistics.median(figures["first_seconds"])
        rows.append(
            [name, *(f"{1000 * step:.0f}" for step in steps), f"{first:.2f}", bench.gib(figures["cgroup_peak"])]
        )
    columns = ["", "ms a token", *(f"ms a step of {batch}" for batch in BATCHES[1:]), f"first of {PROMPT}, s", "peak"]
    bench.show(f"In memory, {CGROUP}", columns, rows)
    return found


def measure_streamed(options: argparse.Namespace) -> dict[str, Any]:
    """The Q4_0 file in a cgroup that it does not fit."""
    file = _gguf_files(options)["q4_0"]
    llama = python_of(options.environments, "llama")
    own = _decode_command(options, file, SMALL_MEMORY)
    theirs = _llama_command(llama, file, prompt=64, new=4, batches=(1,))
    theirs.insert(2, "--as-stored")
    found = {
        "LayerStream": bench.run_child(own, SMALL_CGROUP),
        "llama.cpp, mmap": bench.run_child(theirs, SMALL_CGROUP),
    }
    rows = [[name, bench.spread(figures["step_seconds"]["1"])] for name, figures in found.items()]
    bench.show(f"Q4_0 in {SMALL_CGROUP}", ["", "seconds a token"], rows)
    return found


def _decode_command(options: argparse.Namespace, model: Path, memory: str = RESIDENT_MEMORY) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.quantised", str(model), "--work", str(options.work)]
    return [*command, "--environments", str(options.environments), "--child", "decode", "--argument", memory]


def _llama_command(
    python: Path, file: Path, prompt: int = PROMPT, new: int = NEW, batches: tuple[int, ...] = BATCHES
) -> list[str]:
    script = str(PEERS / "decode_llama_cpp.py")
    return [str(python), script, str(file), str(prompt), str(new), *map(str, batches)]


def _decode(model: Path, memory: str) -> dict[str, Any]:
    """As decode_llama_cpp.py: seconds of the sweeps, sampling included."""
    from layerstream import LayerStream, SamplingParams

    times = SweepTimes()
    options: dict[str, Any] = {"kv_store": None, "speculation": "off", "max_context": 1024, "progress": times}
    with LayerStream(model, memory=memory, **options) as engine:
        firsts = []
        once = SamplingParams(max_tokens=1, temperature=0.0)
        is_small = engine.plan.streams
        for _ in range(1 if is_small else 3):
            started = time.perf_counter()
            engine.generate(times.draw_prompt(64 if is_small else PROMPT), once)
            firsts.append(time.perf_counter() - started)
        steps: dict[int, list[float]] = {}
        for batch in BATCHES[:1] if is_small else BATCHES:
            marks: list[float] = []
            params = SamplingParams(max_tokens=(4 if is_small else NEW) + 2, temperature=0.0, ignore_eos=True)
            requests = [engine.submit(times.draw_prompt(8), params) for _ in range(batch)]
            for delta in requests[0]:
                marks.extend([time.perf_counter()] * bool(delta.token_ids))
            for request in requests:
                request.result(timeout=600)
            steps[batch] = [later - earlier for earlier, later in pairwise(marks[1:])]
        return {"first_seconds": firsts, "step_seconds": steps, "peak": engine.stats().peak_memory_bytes}


def _gguf_files(options: argparse.Namespace) -> dict[str, Path]:
    """The GGUF files, each in a folder with the tokenizer; written by llama.cpp's quantiser if they are not there."""
    llama = python_of(options.environments, "llama")
    plain, _ = gguf_of(llama, options.model, options.work)
    found = {}
    for name, (number, is_pure) in GGUF_TYPES.items():
        folder = options.work / name
        found[name] = folder / f"{name}.gguf"
        if not found[name].is_file():
            folder.mkdir(exist_ok=True)
            for file in options.model.glob("tokenizer*"):
                (folder / file.name).write_bytes(file.read_bytes())
            arguments = [str(plain), str(found[name]), str(number), str(int(is_pure))]
            subprocess.run([str(llama), str(PEERS / "quantise_llama_cpp.py"), *arguments], check=True)
    return found


if __name__ == "__main__":
    main()
