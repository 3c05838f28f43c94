"""What contextual ingestion costs: a line for each chunk, one chunk after the other, and all of a document at once.

    python -m benchmarks.ingestion [MODEL] [--memory 3GiB] [--chunks 20] [--tokens 32]

Three ways to write the same lines, each with a fresh engine and without a store: *alone* computes the document anew for
every chunk (as an API without a prefix cache does), *one by one* finds it in memory, *at once* is ``ContextualChunks``.
Sweeps and prompt tokens that were computed are counted; they do not depend on the machine. Seconds do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

from layerstream import LayerStream
from layerstream.situating import Chunked, Situating

SENTENCES = (
    "In year {0} the hall of Brenvik had {1} doors and {2} windows.",
    "Its keeper that year was the {1}th of the family, and paid {0} marks in rent.",
    "The roof was mended {2} times, at the cost of the town of Tredry.",
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What writing all lines took."""

    sweeps: int
    computed_tokens: int
    seconds: float
    lines: list[str]


def make_document(num_chunks: int) -> Chunked:
    """A document of *num_chunks* chunks that differ."""
    chunks = [
        " ".join(sentence.format(1500 + number, number % 7, number % 11) for sentence in SENTENCES) + "\n"
        for number in range(num_chunks)
    ]
    return Chunked("".join(chunks), chunks)


def measure(make: Callable[[], LayerStream], work: Callable[[LayerStream], list[str]]) -> Cost:
    """The cost of *work* in a new engine."""
    with make() as engine:
        engine.generate(["Warm up."], {"max_tokens": 1})
        before, started = engine.stats(), time.perf_counter()
        lines = work(engine)
        seconds, after = time.perf_counter() - started, engine.stats()
    return Cost(after.sweeps - before.sweeps, after.tokens_in - before.tokens_in, seconds, lines)


def compare(make: Callable[[], LayerStream], num_chunks: int, max_tokens: int) -> dict[str, Cost]:
    """The three ways; all write the same lines."""
    document, situating = make_document(num_chunks), Situating(max_tokens=max_tokens)

    def one_by_one(engine: LayerStream) -> list[str]:
        each = (Chunked(document.text, [chunk], [document.text.index(chunk)]) for chunk in document.chunks)
        return [line for chunked in each for (line,) in situating.lines(engine, [chunked])]

    def at_once(engine: LayerStream) -> list[str]:
        (lines,) = situating.lines(engine, [document])
        return lines

    found = {"one by one": measure(make, one_by_one), "at once": measure(make, at_once)}
    alone = []
    for chunk in document.chunks:
        one = Chunked(document.text, [chunk], [document.text.index(chunk)])
        alone.append(measure(make, lambda engine, one=one: [line for (line,) in situating.lines(engine, [one])]))
    total = Cost(
        sum(cost.sweeps for cost in alone),
        sum(cost.computed_tokens for cost in alone),
        sum(cost.seconds for cost in alone),
        [line for cost in alone for line in cost.lines],
    )
    return {"alone": total, **found}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()

    def make() -> LayerStream:
        return LayerStream(chosen.model, memory=chosen.memory, kv_store=None, progress=False, chunk_tokens=32)

    print(f"{chosen.chunks} chunks of one document, lines of at most {chosen.tokens} tokens, {chosen.model}")
    print(f"{'':12}{'sweeps':>8}{'computed':>10}{'seconds':>9}")
    costs = compare(make, chosen.chunks, chosen.tokens)
    for name, cost in costs.items():
        print(f"{name:12}{cost.sweeps:8,}{cost.computed_tokens:10,}{cost.seconds:9.1f}")
    print(f"the same lines: {'yes' if len({tuple(cost.lines) for cost in costs.values()}) == 1 else 'no'}")


if __name__ == "__main__":
    main()
