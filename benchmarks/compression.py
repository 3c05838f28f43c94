"""What compressed KV costs in answers: the bundled reader with its contexts' KV kept exactly, in int8 and in fp8.

    python -m benchmarks.compression [--samples 40]

Held-out fact sheets of 8, 20 and 60 facts and a question on each. An engine answers cold and stores the KV; a new one
answers the same prompt from the store. Counted: right answers, and answers that are token by token the cold ones.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.reader.evaluate import FACT_COUNTS
from benchmarks.reader.prompts import END, WRAPPERS, draw_sample

CHUNK = 32  # so that nearly all of a context is in whole pages
CODECS = ("none", "int8", "fp8")


def main() -> None:
    """Answer cold and warm with every codec; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="contexts per number of facts (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts = [item for count in FACT_COUNTS for item in draw(count, options.samples)]
    result: dict[str, Any] = {"samples": options.samples}
    rows = []
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            cold, _ = answer([prompt for _, prompt, _ in prompts], codec, folder)
            warm, stats = answer([prompt for _, prompt, _ in prompts], codec, folder)
        right = {
            count: [a == wanted for a, (facts, _, wanted) in zip(warm, prompts, strict=True) if facts == count]
            for count in FACT_COUNTS
        }
        same = sum(a == b for a, b in zip(cold, warm, strict=True)) / len(prompts)
        cold_right = sum(a == wanted for a, (_, _, wanted) in zip(cold, prompts, strict=True)) / len(prompts)
        result[codec] = {"right": right, "same": same, "cold_right": cold_right, **stats}
        rows.append(
            [
                codec,
                f"{stats['bytes_per_token']:.0f}",
                *(f"{sum(values) / len(values):.1%}" for values in right.values()),
                f"{cold_right:.1%}",
                f"{same:.1%}",
            ]
        )
    bench.show(
        "Answers from stored KV",
        ["codec", "bytes a token", *(f"{count} facts" for count in FACT_COUNTS), "all, cold", "as cold"],
        rows,
    )
    print("written to", bench.save("compression", result, options.json))


def draw(num_facts: int, samples: int) -> list[tuple[int, str, str]]:
    """``(facts, prompt, answer)`` of the first question on held-out fact sheets."""
    drawn = []
    for index in range(samples):
        wrapper = list(WRAPPERS)[index % len(WRAPPERS)]
        sample = draw_sample(random.Random(f"compressed, {wrapper}, {num_facts} facts, {index}"), num_facts, wrapper)
        at = next(at for at, (_, is_answer) in enumerate(sample.pieces) if is_answer)
        prompt = "".join(text for text, _ in sample.pieces[:at])
        drawn.append((num_facts, prompt, sample.pieces[at][0].removesuffix(END).strip()))
    return drawn


def answer(prompts: list[str], codec: str, folder: str) -> tuple[list[str], dict[str, Any]]:
    """The answers of one engine, and what it stored or loaded."""
    from layerstream import KVStoreConfig, LayerStream, SamplingParams

    store = KVStoreConfig(folder, load="always", max_bytes="10GiB", min_free_bytes=0, compression=codec)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=24, temperature=0.0)
    with LayerStream("demo", kv_store=store, chunk_tokens=CHUNK, progress=False) as engine:
        texts = [engine.generate([prompt], params)[0].text.strip() for prompt in prompts]
        stats = engine.stats().kv
    files = [path.stat().st_size for path in Path(folder).rglob("*.kv")]
    pages = sum(1 for _ in files)
    return texts, {
        "loaded_tokens": stats.loaded_tokens,
        "reused_tokens": stats.reused_tokens,
        "bytes_per_token": sum(files) / max(1, stats.loaded_tokens or stats.written_pages * CHUNK) if pages else 0,
    }


if __name__ == "__main__":
    main()
