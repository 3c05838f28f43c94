"""Routings to measure an expert cache on, and what others would make of them: LRU, and who knows what comes.

A routing is ``(sweeps, layers, top_k)``: the experts that the one row of each sweep is routed to. Experts of a layer
are drawn without replacement, the *i*-th most popular with a weight of ``1 / i ** exponent``; which one that is differs
from layer to layer. An exponent of 0 is uniform, the worst that there is for a cache.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def draw_routing(
    *, num_layers: int, num_experts: int, top_k: int, num_sweeps: int, exponent: float, seed: int = 0
) -> np.ndarray:
    """A random routing ``(sweeps, layers, top_k)``."""
    random = np.random.default_rng(seed)
    log_weights = -exponent * np.log(np.arange(1, num_experts + 1))
    found = np.empty((num_sweeps, num_layers, top_k), int)
    for layer in range(num_layers):
        names = random.permutation(num_experts)
        keys = log_weights + random.gumbel(size=(num_sweeps, num_experts))  # the largest k: drawn without replacement
        found[:, layer] = names[np.argsort(-keys, axis=1)[:, :top_k]]
    return found


def requests(routing: np.ndarray, num_experts: int) -> list[int]:
    """The experts of all layers, so many in each, in the order in which they are asked for, each by one number."""
    return (routing + num_experts * np.arange(routing.shape[1])[None, :, None]).reshape(-1).tolist()


def lru_hits(asked: Sequence[int], num_slots: int) -> float:
    """The share of requests that a cache of *num_slots* has that lets go of what was used longest ago."""
    present: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in asked:
        if expert in present:
            hits += 1
            present.move_to_end(expert)
        else:
            if len(present) == num_slots:
                present.popitem(last=False)
            present[expert] = None
    return hits / len(asked)


def static_hits(asked: Sequence[int], num_slots: int) -> float:
    """The share that the best fixed set of *num_slots* has: what anybody can reach who does not know what comes, where
    the rows' choices are independent of each other."""
    counts = np.bincount(np.asarray(asked))
    return float(np.sort(counts)[::-1][:num_slots].sum() / counts.sum())


def clairvoyant_hits(asked: Sequence[int], num_slots: int) -> float:
    """The share that nobody can do better than (Belady's MIN): what is asked for latest goes, also what just came."""
    following = [len(asked)] * len(asked)
    last: dict[int, int] = {}
    for at in range(len(asked) - 1, -1, -1):
        following[at] = last.get(asked[at], len(asked) + at)
        last[asked[at]] = at
    next_use: dict[int, int] = {}
    latest: list[tuple[int, int]] = []  # a heap of (-next use, expert); entries that are not current are skipped
    hits = 0
    for at, expert in enumerate(asked):
        hits += expert in next_use
        next_use[expert] = following[at]
        heapq.heappush(latest, (-following[at], expert))
        while len(next_use) > num_slots:
            when, candidate = heapq.heappop(latest)
            if next_use.get(candidate) == -when:
                del next_use[candidate]
    return hits / len(asked)
