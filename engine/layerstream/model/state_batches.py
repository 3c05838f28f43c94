"""Decode rows of recurrent layers on a device: all that may go on at once do, in one step of constant shape.

A step gathers states from slots, changes them, and puts them back, with as many launches for one sequence as for as
many as it has room for. What pads it reads somebody's state and leaves its own to nobody's slot. The states after
guesses are in no slot: those that have children are kept until the last of these has gone on.

Which step has which rows is decided once for a sweep (:mod:`layerstream.model.state_steps`), and its numbers cross to
each device in one copy. The rows of a step are a power of two that depends on the layer and the block's shape alone, so
a row's bits do not depend on others, and those of a step that accepts a guess are those of the step that verified it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import RowBlock, Sweep
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.model.scans import Call
from layerstream.model.state_steps import StateStep, steps_of


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step on a device: its rows in the block, padded; their *places* without padding; and the slots, padded, where
    *step* has some."""

    step: StateStep
    rows: slice | torch.Tensor
    places: slice | torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """The steps of a block on a device, and which rows of it are guesses."""

    batches: list[_Batch]
    guesses: torch.Tensor


_Part: TypeAlias = tuple[int, str]  # of which recurrent layer, and its name
_Node: TypeAlias = tuple[TokenSequence, int]


class StateBatches:
    """The decode rows of *sweep* on devices."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._decoding = [block for block in sweep.blocks if not block.is_prompt]
        self._blocks: dict[tuple[torch.device, int], dict[int, _Block]] = {}
        self._states: dict[_Part, dict[_Node, torch.Tensor]] = {}
        self._calls: dict[_Part, dict[_Node, tuple[Call, int]]] = {}

    def run(
        self, layer: RecurrentLayer, number: int, start: int, block: RowBlock, call: Call
    ) -> Iterator[tuple[torch.Tensor, slice | torch.Tensor]]:
        """Outputs of *call* for *block*, which starts at its row *start*, in *layer*, the engine's recurrent layer
        *number*; and their places among the rows of *call*."""
        part = number, call.part.name
        slots = layer.slots(call.part.name)
        here = call.cut(slice(start, start + block.num_rows))
        found = self._on(layer, block)
        for batch in found.batches:
            if batch.step.sources:
                states = slots.index_select(0, batch.sources)
            else:
                states = self._of_parents(part, batch.step, layer.rows_at_once(block.num_rows))
            output = here.cut(batch.rows).steps(states, states)
            if batch.step.targets:
                slots.index_copy_(0, batch.targets, states)
            else:
                self._keep_states(part, batch.step, states)
            yield output, _moved(batch.places, start)
        if len(found.guesses):
            kept = here.cut(found.guesses).kept()
            guessed = [span for span in block.spans if span.is_drafted]
            calls = self._calls.setdefault(part, {})
            calls.update({(span.sequence, span.node): (kept, row) for row, span in enumerate(guessed)})

    def accept(self, layer: RecurrentLayer, number: int, sequence: TokenSequence, nodes: Sequence[int]) -> None:
        """The guesses *nodes*, a path, were right: the state of *sequence* in *layer* is the one after them."""
        slot = sequence.tenancy.state
        assert slot is not None, "a sequence with guesses has a state"
        at_once = layer.rows_at_once(self._decoding[0].num_rows)
        for name, state in layer.parts(slot).items():
            states = state.expand(at_once, *state.shape).clone()
            for node in nodes:
                call, row = self._calls[number, name][sequence, node]
                call.cut(torch.full((at_once,), row, device=state.device)).steps(states, states)
            state.copy_(states[0])

    def _of_parents(self, part: _Part, step: StateStep, at_once: int) -> torch.Tensor:
        """``(at_once, *shape)``: the states after the parents of guesses."""
        kept = self._states[part]
        found: list[torch.Tensor] = []
        for span in step.spans:
            tree = self._sweep.drafts[span.sequence]
            parent = tree.parents[span.node]
            is_last = tree.last_children[parent] == span.node
            found.append(kept.pop((span.sequence, parent)) if is_last else kept[span.sequence, parent])
        return torch.stack(found + [found[0]] * (at_once - len(found)))

    def _keep_states(self, part: _Part, step: StateStep, states: torch.Tensor) -> None:
        kept = self._states.setdefault(part, {})
        for span, state in zip(step.spans, states.unbind(), strict=False):
            if span.node in self._sweep.drafts[span.sequence].last_children:
                kept[span.sequence, span.node] = state

    def _on(self, layer: RecurrentLayer, block: RowBlock) -> _Block:
        device, at_once = layer.device, layer.rows_at_once(block.num_rows)
        assert device is not None, "on the processor rows go one by one"
        found = self._blocks.get((device, at_once))
        if found is None:
            found = self._blocks[device, at_once] = self._cross(device, at_once, layer.nobody)
        return found[id(block)]

    def _cross(self, device: torch.device, at_once: int, nobody: int) -> dict[int, _Block]:
        """The steps of all decode blocks on *device*."""
        numbers: list[int] = []
        cuts: list[tuple[int, int]] = []

        def put(values: Sequence[int], padding: int | None = None) -> int:
            """Where *values* are among the cuts."""
            padded = [*values, *([padding] * (at_once - len(values)) if padding is not None and values else ())]
            cuts.append((len(numbers), len(padded)))
            numbers.extend(padded)
            return len(cuts) - 1

        planned = []
        for block in self._decoding:
            steps = [
                (
                    step,
                    put(step.rows, step.rows[0]),
                    put(step.sources, step.sources[0] if step.sources else None),
                    put(step.targets, nobody),
                )
                for step in steps_of(block, self._sweep, at_once)
            ]
            planned.append((block, steps, put([row for row, span in block.spans_from(0) if span.is_drafted])))
        there = torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
        tensors = [there[start : start + count] for start, count in cuts]
        return {
            id(block): _Block(
                [
                    _Batch(step, *_rows(step.rows, tensors[rows], block.num_rows), tensors[sources], tensors[targets])
                    for step, rows, sources, targets in steps
                ],
                tensors[guesses],
            )
            for block, steps, guesses in planned
        }


def _rows(
    rows: Sequence[int], padded: torch.Tensor, block_rows: int
) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
    """*rows* padded, and their places; as slices of the block where they are neighbours and what pads them, too."""
    first, count = rows[0], len(rows)
    if rows[-1] - first == count - 1 and first + len(padded) <= block_rows:
        return slice(first, first + len(padded)), slice(first, first + count)
    return padded, padded[:count]


def _moved(places: slice | torch.Tensor, start: int) -> slice | torch.Tensor:
    """*places*, *start* rows further on."""
    if isinstance(places, slice):
        return slice(places.start + start, places.stop + start)
    return places + start if start else places
