"""What recurrent layers cost on the processor: scans and convolutions of published shapes, piece by piece of a prompt
and row by row, beside transformers' own functions, attention, and the projections of the same layer.

    python -m benchmarks.scans [--seconds 1] [--shapes Qwen3.6-27B ...]

Inputs are bfloat16, decays as random weights of these families give them. A time is the least of those taken in
``--seconds``, in milliseconds. Attention is SDPA of the shape that the family's other layers have (query heads, key
heads, width), from rows after a context to the context and each other; projections are those into and out of the mixer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layerstream.model.scans import SCANS, Call, identity
from torch.nn import functional as F
from transformers.models.falcon_mamba import modeling_falcon_mamba as falcon
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from benchmarks import bench

ROWS = (1, 64, 128)
CONTEXTS = (512, 4096)
DTYPE = torch.bfloat16
Function = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Scan:
    """A recurrence over *rows*: our call, and transformers' function from the same state."""

    call: Call
    theirs: Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a family's layers.

    Attributes:
        channels: of the convolution, with a kernel of four.
        projections: into the mixer and out of it, ``(in, out)`` each.
        attention: query heads, key heads and width of the other layers; ``None``: there are none.
    """

    channels: int
    projections: tuple[tuple[int, int], ...]
    attention: tuple[int, int, int] | None
    scan: Callable[[int], Scan]


def main() -> None:
    """Measure every shape; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[int, dict[str, float]]] = {}
    with torch.inference_mode():
        for name in options.shapes:
            found[name] = {rows: measure(SHAPES[name], rows, options.seconds) for rows in ROWS}
    columns = ["shape", "rows", "scan", "conv.", "transformers'", *(f"attention, {c}" for c in CONTEXTS), "projections"]
    bench.show(f"Recurrent layers, ms ({identity()})", [*columns, "of the mixer"], _table(found))
    print(bench.save("scans", {"scans": identity(), "shapes": found}, options.json))


def measure(shape: Shape, rows: int, seconds: float) -> dict[str, float]:
    """Milliseconds of each part with *rows* rows."""
    scan, convolution = shape.scan(rows), _convolution(shape.channels, rows)
    functions: dict[str, Function] = {
        "scan": _ours(scan.call),
        "convolution": _ours(convolution.call),
        "transformers_scan": _theirs(scan),
        "transformers_convolution": _theirs(convolution),
        "projections": _projections(shape.projections, rows),
    }
    if shape.attention is not None:
        for context in CONTEXTS:
            functions[f"attention_{context}"] = _attention(*shape.attention, rows, context)
    return {name: _least(function, seconds) for name, function in functions.items()}


def _table(found: dict[str, dict[int, dict[str, float]]]) -> list[list[str]]:
    table: list[list[str]] = []
    for name, by_rows in found.items():
        for rows, times in by_rows.items():
            theirs = times["transformers_scan"] + times["transformers_convolution"]
            attention = [times.get(f"attention_{context}") for context in CONTEXTS]
            own = times["scan"] + times["convolution"]
            values = [times["scan"], times["convolution"], theirs, *attention, times["projections"]]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            table.append([name, str(rows), *cells, f"{own / (own + times['projections']):.0%}"])
    return table


def _least(function: Function, seconds: float) -> float:
    """Milliseconds of the fastest call of those that take *seconds*; three at the least."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _state(call: Call) -> torch.Tensor:
    return torch.randn(call.part.shape).to(getattr(torch, call.part.dtype))


def _ours(call: Call) -> Function:
    state, left = _state(call), _state(call)
    run = call.step if call.num_rows == 1 else call.chunk
    return lambda: run(state, left)


def _theirs(scan: Scan) -> Function:
    state = _state(scan.call)[None]
    return lambda: scan.theirs(state)


def _projections(sizes: tuple[tuple[int, int], ...], rows: int) -> Function:
    pairs = [(_random(rows, width), _random(out, width)) for width, out in sizes]
    return lambda: [F.linear(inputs, weight) for inputs, weight in pairs]


def _attention(heads: int, key_heads: int, width: int, rows: int, context: int) -> Function:
    query = _random(1, heads, rows, width)
    key, value = (_random(1, key_heads, context + rows, width) for _ in range(2))
    mask = torch.ones(rows, context + rows, dtype=torch.bool).tril(context)
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE)


def _decays(*shape: int) -> torch.Tensor:
    """Logarithms of what is left after a row, from ``-A softplus(dt)`` at the values that weights begin with."""
    return -torch.empty(shape).uniform_(1, 16) * torch.empty(shape).uniform_(1e-3, 1e-1)


def _convolution(channels: int, rows: int) -> Scan:
    columns, weight = _random(1, rows, channels).mT, _random(channels, 4)

    def theirs(state: torch.Tensor) -> object:
        if rows == 1:
            return qwen.causal_conv1d_update(columns, state, weight, activation="silu")
        return qwen.causal_conv1d_fn(torch.cat((state, columns), 2), weight, activation="silu")

    return Scan(SCANS["causal_conv1d_fn"](columns, weight, activation="silu"), theirs)


def _delta_rule(heads: int, key_heads: int, width: int) -> Callable[[int], Scan]:
    def scan(rows: int) -> Scan:
        function = qwen.torch_recurrent_gated_delta_rule if rows == 1 else qwen.torch_chunk_gated_delta_rule
        tensors = (*(_random(1, rows, key_heads, width) for _ in range(2)), _random(1, rows, heads, width))
        named = {"g": _decays(1, rows, heads), "beta": _random(1, rows, heads).sigmoid()}
        return _rule("torch_chunk_gated_delta_rule", function, tensors, named)

    return scan


def _channel_decay(heads: int, width: int) -> Callable[[int], Scan]:
    def scan(rows: int) -> Scan:
        function = kimi.recurrent_kimi_delta_attention if rows == 1 else kimi.chunk_kimi_delta_attention
        tensors = tuple(_random(1, rows, heads, width) for _ in range(3))
        named = {"g": _decays(1, rows, heads, width), "beta": _random(1, rows, heads).sigmoid()}
        return _rule("chunk_kimi_delta_attention", function, tensors, named)

    return scan


def _rule(name: str, function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Scan:
    named = {**named, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
    return Scan(SCANS[name](*tensors, **named), lambda state: function(*tensors, initial_state=state, **named))


def _state_space(heads: int, width: int, groups: int, states: int) -> Callable[[int], Scan]:
    def scan(rows: int) -> Scan:
        inputs, raw = _random(1, rows, heads, width), _random(1, rows, heads) - 4
        a, d, bias = -torch.empty(heads).uniform_(1, 16), torch.ones(heads), torch.zeros(heads)
        b, c = (_random(1, rows, groups, states) for _ in range(2))
        named = {"chunk_size": 256, "D": d, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}

        def theirs(state: torch.Tensor) -> object:
            if rows > 1:
                return mamba2.mamba2_chunk_scan(inputs, raw, a, b, c, initial_states=state, **named)
            wide = raw.mT.expand(-1, -1, width)
            own = (d[:, None].expand(-1, width), bias[:, None].expand(-1, width))
            decay = a[:, None, None].expand(-1, width, states)
            return mamba2.mamba2_selective_state_update(
                state, inputs[:, 0], wide, decay, b[:, 0], c[:, 0], *own, dt_softplus=True
            )

        return Scan(SCANS["mamba2_chunk_scan"](inputs, raw, a, b, c, **named), theirs)

    return scan


def _selective_scan(channels: int, states: int) -> Callable[[int], Scan]:
    def scan(rows: int) -> Scan:
        inputs, raw, gate = (_random(1, channels, rows) for _ in range(3))
        raw -= 4
        a, d = -torch.arange(1.0, states + 1).repeat(channels, 1), torch.ones(channels)
        b, c = (_random(1, rows, states).mT for _ in range(2))
        named = {"D": d, "z": gate, "delta_softplus": True, "return_last_state": True}

        def theirs(state: torch.Tensor) -> object:
            if rows > 1:
                return falcon.mamba_selective_scan(inputs, raw, a, b, c, **named)
            row = (inputs[..., 0], raw[..., 0], a, b[..., 0], c[..., 0], d)
            return falcon.mamba_selective_state_update(state, *row, z=gate[..., 0], dt_softplus=True)

        return Scan(SCANS["mamba_selective_scan"](inputs, raw, a, b, c, **named), theirs)

    return scan


SHAPES = {
    "Qwen3.6-27B": Shape(10240, ((5120, 16480), (6144, 5120)), (24, 4, 256), _delta_rule(48, 16, 128)),
    "Qwen3.6-35B-A3B": Shape(8192, ((2048, 12352), (4096, 2048)), (16, 2, 256), _delta_rule(32, 16, 128)),
    "Kimi-Linear-48B-A3B": Shape(12288, ((2304, 12576), (4096, 2304)), (32, 32, 128), _channel_decay(32, 128)),
    "Granite-4-H-Small": Shape(8448, ((4096, 16768), (8192, 4096)), (32, 8, 128), _state_space(128, 64, 1, 128)),
    "Nemotron-3-Nano-30B": Shape(6144, ((2688, 10304), (4096, 2688)), (32, 2, 128), _state_space(64, 64, 8, 128)),
    "Falcon-Mamba-7B": Shape(8192, ((4096, 16384), (8192, 4096)), None, _selective_scan(8192, 16)),
}


if __name__ == "__main__":
    main()
