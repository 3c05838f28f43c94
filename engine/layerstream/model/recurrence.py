"""Recurrent layers: every span goes on from the state of its own sequence, and leaves the state after it.

transformers' mixers (convolutions, delta rules, selective scans) ask a cache for one state and call functions over
whole sequences. Here the cache has none to give, and on each mixer's instance the functions of
:mod:`layerstream.model.scans` among its forward's globals are replaced: they cut their arguments by the spans in hand
and run from slot to slot (:class:`~layerstream.core.sweep.StateRoute`). Everything else in the mixer (projections,
norms, gates) is computed in the shape of the row block, as in any module.

Which rows are computed by which form depends on their position alone: a prompt's rows as chunks, generated and guessed
ones step by step. A guess goes on from the state after its parent, which nobody else sees; what it was given is kept,
so that the state after accepted guesses is made without weights (:meth:`Recurrence.accept`), by the very steps that
verified them. On a device all decode rows of a block do so at once (:mod:`layerstream.model.state_batches`).

Invariants: the state that a sequence came with is not written to; within a layer spans are computed in the order of
their rows, so whoever goes on from a state of this sweep finds it there; guesses come after their sequence's known
rows, depth first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from layerstream.core.draft import ROOT
from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.model import elementwise
from layerstream.model.hooks import call_instead
from layerstream.model.scans import SCANS, Call
from layerstream.model.state_batches import StateBatches


class Mixing(Protocol):
    """Runs the scans of a forward under way."""

    def mix(self, layer: int, call: Call) -> Any:
        """What *call*, in the decoder's layer *layer*, returns for all rows in hand."""
        ...


_MIXING: ContextVar[Mixing] = ContextVar("layerstream_mixing")


@contextmanager
def mixing(mixing: Mixing) -> Iterator[None]:
    """Have *mixing* run the scans of mixers."""
    token = _MIXING.set(mixing)
    try:
        yield
    finally:
        _MIXING.reset(token)


def scans_of(module: torch.nn.Module) -> set[str]:
    """Names of the scans that the forward of *module* calls; none: it is no mixer."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else SCANS.keys() & set(code.co_names)


def install(module: torch.nn.Module) -> None:
    """Have the scans that the mixer *module* calls be run by whoever is :func:`mixing`."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    call_instead(module, {name: _mixed(layer, SCANS[name]) for name in scans_of(module)})


def _mixed(layer: int, bind: Callable[..., Call]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return _MIXING.get().mix(layer, bind(*args, **kwargs))

    return run


@dataclass(slots=True)
class _Guesses:
    """What one part of one layer's state needs of a sequence's guesses.

    Attributes:
        states: after those guesses that have children still to come. Of a chain that is one, of a tree as many as it
            branches on the way down.
        calls: what each was given.
    """

    states: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    calls: dict[int, Call] = field(default_factory=dict[int, Call])


class Recurrence:
    """The states of recurrent layers in one sweep.

    Args:
        layers: their slots; *numbers*: which of them the decoder's layers have.
        blocks: the row blocks in hand, each with the row that it starts at.
        wait: returns when the stored states of one of *layers* are in their slots; ``None``: none are to be brought.
    """

    def __init__(
        self,
        sweep: Sweep,
        layers: Sequence[RecurrentLayer],
        numbers: dict[int, int],
        blocks: Callable[[], Iterable[tuple[int, RowBlock]]],
        wait: Callable[[int], None] | None = None,
    ) -> None:
        self._sweep = sweep
        self._layers = layers
        self._numbers = numbers
        self._blocks = blocks
        self._wait = wait
        self._guesses: dict[tuple[int, str, TokenSequence], _Guesses] = {}
        self._batches = StateBatches(sweep)

    def mix(self, layer: int, call: Call) -> Any:
        """As every :class:`Mixing`."""
        number = self._numbers[layer]
        if self._wait is not None:
            self._wait(number)
        outputs: list[torch.Tensor] = []
        rows: list[slice | torch.Tensor] = []
        for start, block in self._blocks():
            if self._layers[number].device is not None and not block.is_prompt:
                for output, places in self._batches.run(self._layers[number], number, start, block, call):
                    outputs.append(output)
                    rows.append(places)
                continue
            for row, span in block.spans_from(start):
                at = slice(row, row + len(span))
                run = self._guess if span.is_drafted else self._known
                outputs.append(run(number, span, call.cut(at)))
                rows.append(at)
        return call.joined(outputs, rows)

    def accept(self, sequence: TokenSequence, nodes: Sequence[int]) -> None:
        """The guesses *nodes*, a path, were right: the state of *sequence* is the one after them."""
        slot = sequence.tenancy.state
        assert slot is not None, "a sequence with guesses has a state"
        with elementwise.steady():  # as in a mixer's forward
            for number, layer in enumerate(self._layers):
                if layer.device is not None:
                    self._batches.accept(layer, number, sequence, nodes)
                    continue
                for name, state in layer.parts(slot).items():
                    calls = self._guesses[number, name, sequence].calls
                    for node in nodes:
                        calls[node].step(state, state)

    def _known(self, number: int, span: Span, call: Call) -> torch.Tensor:
        route = self._sweep.routes[span.sequence]
        before = route.before(span.start)
        layer, name = self._layers[number], call.part.name
        state = None if before is None else layer.parts(before)[name]
        left = layer.parts(route.after(span.stop))[name]
        is_prompt = span.start < span.sequence.num_prompt_tokens
        return call.chunk(state, left) if is_prompt else call.step(state, left)

    def _guess(self, number: int, span: Span, call: Call) -> torch.Tensor:
        sequence, node = span.sequence, span.node
        tree = self._sweep.drafts[sequence]
        name = call.part.name
        guesses = self._guesses.setdefault((number, name, sequence), _Guesses())
        parent = tree.parents[node]
        if parent == ROOT:
            state = self._layers[number].parts(self._sweep.routes[sequence].target)[name]
            left = torch.empty_like(state)
        elif tree.last_children[parent] == node:  # nobody else goes on from there
            state = left = guesses.states.pop(parent)
        else:
            state = guesses.states[parent]
            left = torch.empty_like(state)
        output = call.step(state, left)
        if node in tree.last_children:
            guesses.states[node] = left
        guesses.calls[node] = call.kept()
        return output
