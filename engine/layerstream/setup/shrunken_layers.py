"""Which layers of a config stay when it is shrunk, and what its lists, counts and overrides by layer say of them.

Pure. A layer's kind is all that is said of it: its entries in the lists that have one for each layer, the lists of
layer numbers that it is in, the sides of the counts ("the first three are dense") that it is on, its own overrides.
The first and the last layer stay, and one of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_LAYERS = 4
LEAST_TOWER_LAYERS = 2
MOST_LAYERS = 12
_DEPTH = re.compile(
    r"^(num_hidden_layers|depth|(n|num|encoder|decoder)_layers?|num_(en|de)coder_layers|num_blocks|layers)$"
)
_FROM_START = re.compile(r"^(first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index)$")
_FROM_END = re.compile(r"^num_kv_shared_layers$")
_LAST = re.compile(r"^moe_layer_end_index$")
_PERIOD = re.compile(r"(layer_(step|interval|period)|sparse_step|window_pattern|every_n_layers|layer_group_size)$")
_OFFSET = re.compile(r"layer_offset$")
_NUMBERS = re.compile(r"(layers|layer_ids|idxs|indices|indexes)$")
OVERRIDES = "per_layer_config"
Smaller = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of a config that stay.

    Attributes:
        depth: layers that there were.
        kept: those that stay, ascending.
        globals: what the config says of all layers, which overrides are measured by.
    """

    depth: int
    kept: tuple[int, ...]
    globals: Mapping[str, Any]

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Layers | None:
        """Those of a config that says *said*, by standard names; ``None``: it has no layers."""
        depth = next((value for name, value in said.items() if _DEPTH.search(name) and type(value) is int), None)
        if not depth:
            return None
        least = LEAST_LAYERS if "vocab_size" in said else LEAST_TOWER_LAYERS
        return cls(depth, _choose([_kind(said, depth, layer) for layer in range(depth)], least), said)

    def are_told_by(self, name: str, value: Any) -> bool:
        """Whether the field *name* says something of single layers, or how many there are."""
        by_name = (_DEPTH, _FROM_START, _FROM_END, _LAST, _PERIOD, _OFFSET)
        if type(value) is int:
            return any(pattern.search(name) for pattern in by_name)
        return (name == OVERRIDES and value is not None) or _is_by_layer(name, value, self.depth)

    def cut(self, name: str, value: Any, smaller: Smaller) -> Any:
        """*value* of such a field, for the layers that stay; sizes by *smaller*."""
        if name == OVERRIDES:
            return self._overrides(value, smaller)
        if isinstance(value, list | tuple):
            if _are_numbers(name, value, self.depth):
                return [new for new, layer in enumerate(self.kept) if layer in value]
            return _smaller_entries(name, [value[layer] for layer in self.kept], smaller)
        if _DEPTH.search(name):
            return len(self.kept) if value == self.depth else min(value, LEAST_TOWER_LAYERS)
        if _FROM_START.search(name):
            return sum(layer < value for layer in self.kept)
        if _FROM_END.search(name):
            return sum(layer >= self.depth - value for layer in self.kept)
        if _LAST.search(name):
            return value if value < 0 else sum(layer <= value for layer in self.kept) - 1
        return min(value, 1 if _OFFSET.search(name) else 2)

    def _overrides(self, value: Mapping[Any, Mapping[str, Any]], smaller: Smaller) -> dict[str, dict[str, Any]]:
        by_layer = {int(layer): entries for layer, entries in value.items()}
        return {
            str(new): {name: self._override(name, entry, smaller) for name, entry in by_layer[layer].items()}
            for new, layer in enumerate(self.kept)
            if layer in by_layer
        }

    def _override(self, name: str, value: Any, smaller: Smaller) -> Any:
        """What differed from the other layers still does."""
        common, small = self.globals.get(name), smaller(name, value)
        if type(value) is not int or type(common) is not int or value == common or small != smaller(name, common):
            return small
        return small * 2 if value > common else max(1, small // 2)


def _kind(said: Mapping[str, Any], depth: int, layer: int) -> tuple[Any, ...]:
    kind: list[Any] = []
    for name, value in sorted(said.items()):
        if name == OVERRIDES and value:
            own = {int(key): entries for key, entries in value.items()}.get(layer, {})
            kind.append(repr(sorted(own.items())))
        elif _is_by_layer(name, value, depth):
            kind.append(layer in value if _are_numbers(name, value, depth) else repr(value[layer]))
        elif type(value) is int and _FROM_START.search(name):
            kind.append(layer < value)
        elif type(value) is int and _FROM_END.search(name):
            kind.append(layer >= depth - value)
        elif type(value) is int and _LAST.search(name):
            kind.append(layer <= value)
    return tuple(kind)


def _choose(kinds: list[tuple[Any, ...]], least: int) -> tuple[int, ...]:
    """The first and the last, the first of every kind (of very many: until nothing in them is new), and *least*."""
    last, seen = len(kinds) - 1, set[Any]()
    kept = {0, last}
    for layer, kind in enumerate(kinds):
        parts = {kind} if len(kept) < MOST_LAYERS else set(enumerate(kind))
        if not parts <= seen:
            kept.add(layer)
        seen |= {kind, *enumerate(kind)}
    kept |= set([layer for layer in range(last) if layer not in kept][: max(0, least - len(kept))])
    return tuple(sorted(kept))


def _is_by_layer(name: str, value: Any, depth: int) -> bool:
    if not isinstance(value, list | tuple) or "token" in name:
        return False
    return len(value) == depth or _are_numbers(name, value, depth)


def _are_numbers(name: str, value: Any, depth: int) -> bool:
    """Whether the list has numbers of layers, not an entry for each."""
    return (
        _NUMBERS.search(name) is not None
        and all(type(item) is int and 0 <= item < depth for item in value)
        and list(value) == sorted(set(value))
    )


def _smaller_entries(name: str, values: list[Any], smaller: Smaller) -> list[Any]:
    """Sizes by layer: those that differed still do, in their order."""
    sizes = sorted({value for value in values if type(value) is int})
    if not sizes or sizes[0] <= 1:  # flags
        return values
    return [
        min(value, smaller(name, value) * (1 + sizes.index(value))) if type(value) is int else value for value in values
    ]
