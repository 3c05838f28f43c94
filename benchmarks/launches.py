"""What a card is asked for, layer by layer, counted without one: launches, views, copies and marks of a decode sweep.

    python -m benchmarks.launches [--sequences 1 8 32 128] [--models dense mixture] [--formats bf16 nf4 int4]

Models are small, and run on the pretended device of the tests: a count depends on the number of layers and matrices,
not on their size. What one layer takes is what a model with one more of them takes more; the rest is the embedding's,
the head's and the sweep's own. A launch costs a card's driver some microseconds, and what is launched for a few rows is
mostly done sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from layerstream.errors import BudgetTooSmall
from layerstream.planner import facts as assumed
from layerstream.planner import on_host
from layerstream.setup.assembly import assemble
from layerstream.setup.config import EngineConfig
from layerstream.setup.plan_model import plan_model

from benchmarks import bench, random_checkpoint
from tests import harness
from tests.counting import Counts, count_decoding
from tests.pretend import PretendCuda, pretend_cuda

_SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", **_SIZES},
    "mixture": {
        "model_type": "qwen3_moe", **_SIZES, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
MATRICES = {"dense": 7, "mixture": 4}
"""Linears of a layer, experts apart."""

FORMATS = ("bf16", "nf4", "int4")
PLACES = ("resident", "host")
FEWER, MORE = 4, 5  # layers, too many to stay where memory is at its least
LAYER_BYTES = 2**20  # more than a layer has: a unit is a layer
MOST = 128  # sequences
STEPS = 4  # tokens of each sequence
PROMPT = 2  # tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """What a decode sweep asks for: each layer, and what is no layer's."""

    layer: Counts
    rest: Counts


def main() -> None:
    """Count everything; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", nargs="*", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--places", nargs="*", choices=PLACES, default=list(PLACES))
    parser.add_argument("--operators", action="store_true", help="also print which operators a layer launches")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows: list[list[str]] = []
    found: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patches, pretended(patches) as device, tempfile.TemporaryDirectory() as work:
        for model in options.models:
            for form in options.formats:
                folders = write(model, form, Path(work) / f"{model}-{form}")
                for place in options.places:
                    by_number = {count: measure(folders, place, count, device) for count in options.sequences}
                    rows += _rows(f"{model}, {form}, {place}", by_number)
                    found += [_saved(model, form, place, *entry) for entry in by_number.items()]
                    if options.operators:
                        _explain(by_number)
    columns = ["model, format, weights", "sequences", "launches", "views", "copies", "marks", "rest: launches"]
    bench.show("A layer of a decode sweep", [*columns, "views", "copies"], rows)
    print(bench.save("launches", {"counts": found}, options.json))


@contextlib.contextmanager
def pretended(patches: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """A pretended device to which small models stream as if they were large, in whole layers, with room for
    :data:`MOST` sequences."""
    harness.shrink_units(patches)
    patches.setattr(on_host, "FINEST_UNIT_BYTES", LAYER_BYTES)
    patches.setattr(on_host, "MIN_KV_TOKENS", 64 * MOST)
    patches.setattr(on_host, "LEAST_SEQUENCES", MOST)
    with pretend_cuda(patches) as device:
        patches.setattr(assumed, "DEVICE_SWEEP_TOKENS", 4 * MOST)
        patches.setattr(assumed, "DEVICE_PROMPT_ROWS", 2 * MOST)
        patches.setattr(assumed, "DEVICE_ROWS", MOST)
        yield device


def write(model: str, form: str, folder: Path) -> dict[int, Path]:
    """Random checkpoints of *model* in *form* below *folder*, by their number of layers."""
    kind = None if form == "bf16" else form
    return {
        layers: random_checkpoint.write(MODELS[model], folder / str(layers), layers, kind) for layers in (FEWER, MORE)
    }


def measure(folders: dict[int, Path], place: str, num_sequences: int, device: PretendCuda) -> Asked:
    """What a sweep asks for in which *num_sequences* decode, weights being at *place*."""
    memory = 2**30 if place == "resident" else least_bytes(folders[MORE])
    fewer, more = (_count(folders[layers], memory, num_sequences, device) for layers in (FEWER, MORE))
    layer = more.per_layer(fewer, MORE - FEWER)
    return Asked(layer, fewer.per_layer(layer.times(FEWER), 1))


def least_bytes(folder: Path) -> int:
    """The least memory that a model on a device streams in, by whole layers."""
    try:
        plan_model(_config(folder, 1))
    except BudgetTooSmall as error:
        return error.required_bytes
    raise AssertionError("a byte is enough")


def _count(folder: Path, memory_bytes: int, num_sequences: int, device: PretendCuda) -> Counts:
    parts = assemble(_config(folder, memory_bytes), None)
    try:
        prompts = [harness.draw_prompt(PROMPT, index) for index in range(num_sequences)]
        return count_decoding(parts, [device], prompts, STEPS)
    finally:
        parts.close()


def _config(folder: Path, memory_bytes: int) -> EngineConfig:
    return EngineConfig(
        str(folder),
        device="cuda",
        dtype="bfloat16",
        memory_bytes=memory_bytes,
        host_memory_bytes=2**30,
        cuda_graphs=False,  # a graph is one launch, whatever is in it
    )


def _rows(name: str, by_number: dict[int, Asked]) -> list[list[str]]:
    rows = []
    for count, asked in by_number.items():
        layer, rest = asked.layer.totals(), asked.rest.totals()
        values = [layer["launches"], layer["views"], layer["copies"], layer["marks"]]
        values += [rest["launches"], rest["views"], rest["copies"]]
        rows.append([name if not rows else "", str(count), *(f"{value:.4g}" for value in values)])
    return rows


def _saved(model: str, form: str, place: str, count: int, asked: Asked) -> dict[str, Any]:
    sides = {"layer": asked.layer, "rest": asked.rest}
    counts = {side: {**counts.totals(), "by_name": vars(counts)} for side, counts in sides.items()}
    return {"model": model, "format": form, "weights": place, "sequences": count, **counts}


def _explain(by_number: dict[int, Asked]) -> None:
    for count, asked in by_number.items():
        for name, counter in vars(asked.layer).items():
            print(count, name, ", ".join(f"{key} {value:.4g}" for key, value in counter.most_common() if value))


if __name__ == "__main__":
    main()
