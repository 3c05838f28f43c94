"""The index of a store with many pages: how long opening it and looking a prompt up take.

    python -m benchmarks.kv_index [--pages 100000]

The index is synthetic: keys are random chains of 32 pages, and no segment lies behind them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from layerstream.kv.shape import PageShape
from layerstream.store.index import Index
from layerstream.store.segment import SegmentInfo
from layerstream.store.tiers.folder import StoreFolder

from benchmarks import bench

CHAIN = 32
PER_SEGMENT = 4
LOOKUPS = 200


def main() -> None:
    """Build the index, open it, look chains up; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = StoreFolder(Path(name) / "kv")
        chains = fill(folder.index, options.pages)
        folder.close()
        opened = [_time(lambda: StoreFolder(Path(name) / "kv").close()) for _ in range(9)]
        folder = StoreFolder(Path(name) / "kv")
        found = [_time(lambda chain=chain: _find(folder.index, chain)) for chain in random.sample(chains, LOOKUPS)]
        missed = [_time(lambda: folder.index.find(1, [os.urandom(32) for _ in range(CHAIN)])) for _ in range(LOOKUPS)]
        evict = _time(lambda: folder.index.candidates())
        folder.close()
    result = {"pages": options.pages, "open": opened, "find": found, "miss": missed, "candidates": evict}
    bench.show(
        f"A synthetic index of {options.pages:,} pages",
        ["", "ms, median", "ms, worst"],
        [
            [label, f"{1000 * statistics.median(values):.2f}", f"{1000 * max(values):.2f}"]
            for label, values in (
                ("open and close", opened),
                (f"find a prefix of {CHAIN} pages", found),
                ("find nothing", missed),
                ("list what could be evicted", [evict]),
            )
        ],
    )
    print("written to", bench.save("kv_index", result, options.json))


def fill(index: Index, num_pages: int) -> list[list[bytes]]:
    """Enter chains of pages, in segments."""
    number = index.namespace_id("n" * 40, "{}")
    assert number is not None
    shape = PageShape(8, 128, 8, 128, "bfloat16")
    chains = []
    for _ in range(num_pages // CHAIN):
        keys, parent = [os.urandom(32) for _ in range(CHAIN)], b""
        for at in range(0, CHAIN, PER_SEGMENT):
            some = tuple(keys[at : at + PER_SEGMENT])
            info = SegmentInfo("n" * 40, some, parent, 128, "none", (), (shape,), (), 1.0)
            index.add_segment(number, info, 58_722_409)
            parent = some[-1]
        chains.append(keys)
    return chains


def _find(index: Index, chain: list[bytes]) -> None:
    assert len(index.find(1, chain)) == CHAIN


def _time(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
