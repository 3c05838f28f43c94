"""What an engine takes at most, measured, against its budget: many requests, many answers, beams, log-probabilities.

    python -m benchmarks.ceiling [MODEL] [--memory 84MB,126MB,400MB] [--dtype float32] [--only "32 beams;n=8"]

Without MODEL a small random Llama with a vocabulary of 128,256 is written, whose logits are large beside its weights.
Every scenario is a process of its own, in which the bundled reader has answered once: what libraries take once is not
the engine's, nor is the grammar library's table of the tokenizer. Memory that no file is behind is sampled every two
milliseconds, over what there was before the engine.
Ends with 1 if a scenario took more than its budget and a twentieth.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerstream import ConfigurationError, LayerStream, SamplingParams
from layerstream.hardware.footprint import held_bytes

from benchmarks import bench

TOLERANCE = 1.05
SAMPLE_SECONDS = 0.002
VOCABULARY = 128_256
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
PENALISED = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "seed": 1}


@dataclass(frozen=True)
class Scenario:
    """*requests* prompts of *prompt_tokens*, and what is asked of each."""

    requests: int
    prompt_tokens: int
    params: dict[str, Any]
    max_tokens: int = 8

    def run(self, engine: LayerStream) -> None:
        """All at once."""
        rng = random.Random(1)
        length = min(self.prompt_tokens, engine.context_length - self.max_tokens)
        prompts = [[rng.randrange(20, 300) for _ in range(length)] for _ in range(self.requests)]
        engine.generate(prompts, SamplingParams(max_tokens=self.max_tokens, ignore_eos=True, **self.params))


SCENARIOS = {
    "one": Scenario(1, 24, {}),
    "64 at once": Scenario(64, 24, {}),
    "n=8": Scenario(8, 24, {"n": 8, "temperature": 0.8, "seed": 1}),
    "32 beams": Scenario(1, 24, {"beam_width": 32}),
    "log-probabilities": Scenario(16, 24, {"logprobs": 20}),
    "penalties": Scenario(64, 24, PENALISED),
    "grammar": Scenario(32, 24, {"response_format": {"type": "json_schema", "schema": SCHEMA}}),
    "long prompts": Scenario(3, 1500, {}),
    "long answers": Scenario(4, 24, PENALISED, max_tokens=200),
    "1,000 queued": Scenario(1000, 100, {}, max_tokens=1),
}


class Sampler(threading.Thread):
    """Follows what the process holds until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, held_bytes())

    def stop(self) -> int:
        """The most so far."""
        self._stopped.set()
        self.join()
        return self.peak_bytes


def child(name: str, model: Path, memory: str, dtype: str) -> None:
    """Run the scenario *name*, and print what it took."""
    with LayerStream("demo", memory="1GiB", kv_store=None) as engine:
        engine.generate("Who?", SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9, seed=1, logprobs=2))
    gc.collect()
    before, sampler = held_bytes(), Sampler()
    sampler.start()
    with LayerStream(model, memory=memory, dtype=dtype, kv_store=None) as engine:
        skipped, table = "", 0
        if "response_format" in SCENARIOS[name].params:
            table = grammar_table(engine)
        try:
            SCENARIOS[name].run(engine)
        except ConfigurationError as error:  # more beams than there is room for KV of
            skipped = str(error)
        peak, stats = sampler.stop() - before - table, engine.stats()
    figures = {
        "budget_bytes": stats.budget_bytes,
        "peak_bytes": peak,
        "reported_bytes": stats.peak_memory_bytes,
        "planned_bytes": engine.plan.planned_bytes,
        "streams": engine.plan.streams,
        "grammar_table_bytes": table,
        "sweeps": stats.sweeps,
        "skipped": skipped,
    }
    print("\n" + json.dumps(figures), flush=True)


def grammar_table(engine: LayerStream) -> int:
    """What the grammar library keeps of the tokenizer from the first grammar on: as the tokenizer itself, it is not
    planned, and does not grow."""
    held, now = 0, held_bytes()
    while now != held:  # memory for KV is still being taken
        time.sleep(0.5)
        held, now = now, held_bytes()
    engine._intake._grammars.special_tokens()
    return held_bytes() - held


def write_model(folder: Path) -> Path:
    """A random Llama with a large vocabulary and the bundled reader's tokenizer."""
    import torch
    import transformers
    from layerstream.checkpoint.hub import bundled_reader

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in bundled_reader().glob("*token*"):
        shutil.copy(file, folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--memory", default="84MB,126MB,400MB", help="budgets, with commas between them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", help="names of scenarios, with semicolons between them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.model, options.memory, options.dtype)
        return 0
    names = options.only.split(";") if options.only else list(SCENARIOS)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or write_model(Path(scratch))
        command = [sys.executable, "-m", "benchmarks.ceiling", str(model), "--dtype", options.dtype]
        results = [
            {"scenario": name, **bench.run_child([*command, "--memory", memory, "--child", name])}
            for memory in options.memory.split(",")
            for name in names
        ]
    return report(results, options.json)


def report(results: list[dict[str, Any]], path: Path | None) -> int:
    """Print and save *results*; 1 if one is past its budget."""
    rows = [
        [
            result["scenario"],
            "streams" if result["streams"] else "stays",
            *(f"{result[key] / 1e6:.1f}" for key in ("budget_bytes", "planned_bytes", "peak_bytes", "reported_bytes")),
            "no room" if result["skipped"] else f"{result['peak_bytes'] / result['budget_bytes']:.2f}",
        ]
        for result in results
    ]
    columns = ("scenario", "weights", "budget, MB", "planned", "peak", "stats()", "peak / budget")
    over = [result for result in results if result["peak_bytes"] > TOLERANCE * result["budget_bytes"]]
    bench.show("Memory at most against the budget", columns, rows, f"{len(over)} of {len(results)} past it by over 5 %")
    print(bench.save("ceiling", {"machine": bench.machine(), "results": results, "over": len(over)}, path))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
