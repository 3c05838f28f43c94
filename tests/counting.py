"""What a sweep asks of a device, counted on the pretended one: launches, views, copies, marks.

A *launch* is an operator of torch that is no view and no allocation, on tensors of a pretended device: a kernel that a
real one would be given. What is composed of others is taken apart first, as torch does it, but for what one kernel
computes on a card (:data:`FUSED`) and for stand-ins of kernels, which say so (:func:`one_launch`). Counts are exact and
repeatable, which times on a card are not.

Launches and views are those of the thread that counts, which is the one that computes. Copies and marks are of all
threads, by lane; a copier works ahead of the sweep that its copies are for, so what it does is a mean over sweeps.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerstream.core.sweep import Sweep
from layerstream.setup.assembly import Assembly
from layerstream.setup.stepping import step_greedily
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = frozenset({"scaled_dot_product_attention", "rms_norm"})
"""Composed operators that one kernel computes on a card."""

_ALLOCATIONS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "_resize_output_"}
)
_VIEWS = frozenset({"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "set_"})
_LANES = ("compute", "inward", "outward")
_HERE = threading.local()


@dataclass
class Counts:
    """Of one sweep, or of a part of it.

    Attributes:
        launches: by operator.
        copies: by lane; ``"torch"``: between host and device without a lane.
        marks: made, and waited for by a lane (``"… after"``), by lane.
    """

    launches: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)

    def totals(self) -> dict[str, float]:
        """How many of each."""
        return {name: sum(counter.values()) for name, counter in vars(self).items()}

    def per_layer(self, fewer: Counts, num_layers: int) -> Counts:
        """What one layer takes, *fewer* being those of a model with *num_layers* less."""
        found = {}
        for name, counter in vars(self).items():
            keys = counter.keys() | getattr(fewer, name).keys()
            found[name] = Counter({key: (counter[key] - getattr(fewer, name)[key]) / num_layers for key in keys})
        return Counts(**found)

    def times(self, count: int) -> Counts:
        """So many of each *count* times."""
        return Counts(*(Counter({key: count * value for key, value in c.items()}) for c in vars(self).values()))


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """What this thread computes within, a device computes."""
    depth = getattr(_HERE, "depth", 0)
    _HERE.depth = depth + 1
    try:
        yield
    finally:
        _HERE.depth = depth


@contextlib.contextmanager
def one_launch(name: str | None) -> Iterator[None]:
    """What this thread computes within stands for one kernel called *name*; ``None``: for none."""
    counts, _HERE.counts = getattr(_HERE, "counts", None), None
    if counts is not None and name is not None:
        counts.launches[name] += 1
    try:
        yield
    finally:
        _HERE.counts = counts


def crossed() -> None:
    """A tensor went between host and device without a lane."""
    if (counts := getattr(_HERE, "counts", None)) is not None:
        counts.copies["torch"] += 1


class _Operators(TorchDispatchMode):
    """Counts what torch does on devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counts = getattr(_HERE, "counts", None)
        if counts is None or not getattr(_HERE, "depth", 0):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in FUSED:
            with self:
                if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return found
        if func.is_view or name in _VIEWS:
            counts.views[name] += 1
        elif name not in _ALLOCATIONS:
            counts.launches[name] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(devices: Sequence[Any]) -> Iterator[Counts]:
    """What this thread asks of *devices*, and all threads of their lanes."""
    counts = Counts()
    before, _HERE.counts = getattr(_HERE, "counts", None), counts
    with contextlib.ExitStack() as stack:
        for device in devices:
            for name in _LANES:
                stack.enter_context(_counted(getattr(device, name), name, counts))
        try:
            with _Operators():
                yield counts
        finally:
            _HERE.counts = before


@contextlib.contextmanager
def _counted(lane: Any, name: str, counts: Counts) -> Iterator[None]:
    """*lane* with what it is asked for in *counts*."""
    copy, mark, after = lane.copy, lane.mark, lane.after

    def copied(*args: Any) -> None:
        counts.copies[name] += 1
        copy(*args)

    def marked(**options: Any) -> Any:
        counts.marks[name] += 1
        return mark(**options)

    def waited(other: Any) -> None:
        counts.marks[f"{name} after"] += 1
        after(other)

    lane.copy, lane.mark, lane.after = copied, marked, waited
    try:
        yield
    finally:
        del lane.copy, lane.mark, lane.after


def count_decoding(parts: Assembly, devices: Sequence[Any], prompts: Sequence[Sequence[int]], steps: int) -> Counts:
    """Of a sweep in which all *prompts* decode, on average over all of those but the first and the last.

    Raises:
        AssertionError: there was none.
    """
    found: list[Counts] = []
    with contextlib.ExitStack() as stack:
        scopes = [stack.enter_context(contextlib.ExitStack())]

        def watch(sweep: Sweep) -> None:
            if sweep.num_decode_rows == sweep.num_rows - sum(b.num_padding for b in sweep.blocks) == len(prompts):
                found.append(scopes[0].enter_context(counting(devices)))

        step_greedily(parts, prompts, steps, watch=watch, between=lambda: scopes[0].close())
    steady = found[1:-1]
    assert steady, "no sweep had all of them"
    empty = Counts()
    summed = Counts(*(sum((getattr(c, name) for c in steady), Counter()) for name in vars(empty)))
    return summed.per_layer(empty, len(steady))
