"""What a machine does per second, as far as forecasts need it. Pure; measured by :mod:`layerstream.measuring.rates`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

ASSUMED_DECODE = 1e-9  # seconds per value, of a format that was not measured
SLOW_DISK = 100e6  # bytes per second

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine, and perhaps its accelerator.

    Attributes:
        disk: bytes per second of direct reads, several at a time.
        link: bytes per second from pinned host memory to the device; ``None``: the processor computes.
        products: for a dtype, or a kernel for quantised weights, seconds per weight that a row block of so many rows
            takes, the weights out of memory.
        cached: the same for a dtype where the weights were just decoded.
        decode: for a format, seconds per weight.
        layer_seconds: what calling a layer takes, per row block.
        value_seconds: of an activation, for each of the few things that are done to it beside products.
        read_cost: what reading takes from the compute beside it, as a share of the time that the read takes.
        num_measured: how often this was measured; the best of it counts.
        process_bytes: what the process takes beside the engine.
        device_bytes: what the device's libraries take there beside the engine.
    """

    disk: float
    link: float | None = None
    products: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])
    cached: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])
    decode: Mapping[str, float] = field(default_factory=dict[str, float])
    layer_seconds: float = 0.0
    value_seconds: float = 0.0
    read_cost: float = 0.0
    num_measured: int = 0
    process_bytes: int = 0
    device_bytes: int = 0

    def product_seconds(self, kind: str, rows: int, *, cached: bool = False) -> float:
        """Per weight, of a row block of *rows*; between those that were measured a straight line."""
        tables = self.cached if cached else self.products
        table = tables.get(kind) or self.products.get(kind) or next(iter(self.products.values()), {1: 0.0})
        return _interpolated(table, rows)

    def decode_seconds(self, codec: str) -> float:
        """Per weight."""
        return self.decode.get(codec, ASSUMED_DECODE)

    def best_of(self, other: Rates) -> Rates:
        """The faster of both in everything: a machine is slower than it can be when it is busy, and never faster."""
        return Rates(
            disk=max(self.disk, other.disk),
            link=max(self.link or 0.0, other.link or 0.0) or None,
            products=_faster_tables(self.products, other.products),
            cached=_faster_tables(self.cached, other.cached),
            decode=_faster(self.decode, other.decode),
            layer_seconds=_less(self.layer_seconds, other.layer_seconds),
            value_seconds=_less(self.value_seconds, other.value_seconds),
            read_cost=_less(self.read_cost, other.read_cost),
            num_measured=self.num_measured + other.num_measured,
            process_bytes=other.process_bytes or self.process_bytes,
            device_bytes=other.device_bytes or self.device_bytes,
        )

    def sped_up(self, times: float) -> Rates:
        """The same, with all that is computed *times* as fast."""
        tables = (self.products, self.cached)
        products, cached = ({k: {n: s / times for n, s in t.items()} for k, t in table.items()} for table in tables)
        return replace(
            self,
            products=products,
            cached=cached,
            decode={codec: seconds / times for codec, seconds in self.decode.items()},
            layer_seconds=self.layer_seconds / times,
            value_seconds=self.value_seconds / times,
        )

    def as_json(self) -> dict[str, Any]:
        """Values that JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rates:
        """What :meth:`as_json` gave.

        Raises:
            TypeError, ValueError, AttributeError: it is something else.
        """
        tables: dict[str, Any] = {
            name: {kind: {int(rows): float(s) for rows, s in table.items()} for kind, table in values[name].items()}
            for name in ("products", "cached")
        }
        if not all(table for kinds in tables.values() for table in kinds.values()):
            raise ValueError("a table without an entry")
        return cls(**{**values, **tables})


def _less(first: float, second: float) -> float:
    """Of two measurements, 0 where there was none."""
    return min(first, second) if first and second else first or second


def _faster(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    return {key: _less(first.get(key, 0.0), second.get(key, 0.0)) for key in {**first, **second}}


def _faster_tables(
    first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]
) -> dict[str, dict[int, float]]:
    return {kind: _faster(first.get(kind, {}), second.get(kind, {})) for kind in {**first, **second}}


def _interpolated(table: Mapping[int, float], rows: int) -> float:
    known = sorted(table)
    if rows <= known[0]:
        return table[known[0]]
    for low, high in pairwise(known):
        if rows <= high:
            return table[low] + (table[high] - table[low]) * (rows - low) / (high - low)
    return table[known[-1]] * rows / known[-1]
