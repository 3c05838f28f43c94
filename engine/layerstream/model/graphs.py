"""Decode sweeps as graphs: what a device was once given to do is given to it again in one launch.

A sweep is *captured* where all that Python decides while the decoder runs follows from shapes: one block of decode
rows, each with its keys where they lie (:meth:`DeviceKV.plain_numbers`), all weights and the KV of all layers on one
device, nobody recording what happens when. What it computes with besides weights and KV lies in buffers that the graph
owns: embedded rows, positions, which rows are sampled, and the numbers of the KV's rows. Before a replay they are
filled anew; after it, logits and the rows that go to the host are where they were the first time. What Python does
around the decoder is done for every sweep: pages are brought before, rows are sent after.

A graph is used again only for a sweep that is alike: the same inputs in the same shapes, and as many rows in use, if
anybody asked for that during the capture. What a captured sweep may not do is refused by the device: to wait for it is
to decide by what it computed. Then, and where memory runs out, there are no graphs any more, and sweeps run as they do
without.

| buffer | owner | written by |
|---|---|---|
| inputs, numbers of KV rows | the graph | the host, before a replay |
| what was made of those numbers | the graph | nobody: it follows from shapes |
| logits, hidden states, new keys and values | the graph, in the pool of all graphs | the replay, read until the next |
| weights, KV pools | others, for the engine's life | others |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from layerstream.hardware.device import Device
from layerstream.kv.on_device import DeviceKV, Written
from layerstream.kv.readings import BlockTensors, SweepNumbers
from layerstream.model.context import SweepContext
from layerstream.model.grouped_experts import Routed

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8  # each keeps its logits and a block's keys and values

Inputs: TypeAlias = Mapping[str, torch.Tensor]
Outputs: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Final hidden states of all rows, and logits of the sampled ones."""
_Kind: TypeAlias = tuple[tuple[str, torch.Size, torch.dtype], ...]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured sweep.

    Attributes:
        num_used: rows that it is for; ``None``: any number.
        routed: what its routers say.
        blocks: *numbers* as kernels look them up, and what was made of them outside of the graph's memory.
    """

    num_used: int | None
    routed: tuple[Routed, ...]
    inputs: Inputs
    numbers: torch.Tensor
    blocks: tuple[BlockTensors, ...]
    outputs: Outputs
    written: Written
    replay: Callable[[], None]


class Graphs:
    """The graphs of an engine whose layers all are on *device*, with their *kv*."""

    def __init__(self, device: Device, kv: DeviceKV) -> None:
        self._device = device
        self._kv = kv
        self._graphs: dict[_Kind, list[_Graph]] = {}
        self._is_given_up = False
        self.num_replays = 0

    def takes(self, context: SweepContext) -> SweepNumbers | None:
        """The numbers of the KV rows of a sweep that may be a graph; ``None``: it has to run."""
        sweep = context.sweep
        if self._is_given_up or len(sweep.blocks) != 1 or sweep.blocks[0].is_prompt or not sweep.sampled:
            return None
        return self._kv.plain_numbers()

    def run(
        self, context: SweepContext, numbers: SweepNumbers, inputs: Inputs, compute: Callable[[Inputs], Outputs]
    ) -> Outputs:
        """What *compute* makes of *inputs* in the sweep of *context*; valid until the next run.

        Raises:
            PagesLost: pages of the sweep could not be brought.
        """
        kind = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        num_used = context.sweep.blocks[0].num_used
        if kind not in self._graphs:  # what is found out at the first time waits for the device
            self._graphs[kind] = []
            return compute(inputs)
        known = self._graphs[kind]
        graph = next((graph for graph in known if graph.num_used in {None, num_used}), None)
        if graph is not None:
            self._fill(graph, numbers, inputs)
            graph.replay()
            self._kv.wrote(graph.written)
            context.routed.extend(graph.routed)
            self.num_replays += 1
            return graph.outputs
        blocks = self._kv.reach_all(numbers, None)
        if sum(map(len, self._graphs.values())) >= MOST_GRAPHS:
            return compute(inputs)
        graph = self._capture(context, numbers, blocks, inputs, compute)
        if graph is None:
            return compute(inputs)
        known.append(graph)
        graph.replay()
        return graph.outputs

    def forget(self, *, for_good: bool = False) -> None:
        """Let go of all graphs; *for_good*: their memory is wanted by others."""
        self._graphs.clear()
        self._is_given_up = self._is_given_up or for_good

    def _fill(self, graph: _Graph, numbers: SweepNumbers, inputs: Inputs) -> None:
        """Put a sweep into the buffers of *graph*."""
        self._kv.reach_all(numbers, graph.numbers)
        for name, tensor in inputs.items():
            graph.inputs[name].copy_(tensor)

    def _capture(
        self,
        context: SweepContext,
        numbers: SweepNumbers,
        blocks: tuple[BlockTensors, ...],
        inputs: Inputs,
        compute: Callable[[Inputs], Outputs],
    ) -> _Graph | None:
        """The sweep as a graph, whose buffers its tensors become; ``None``: there are no graphs from now on."""

        def run() -> Outputs:
            context.routed.clear()
            return compute(inputs)

        context.has_counted = False
        try:
            captured = self._device.capture(run)
        except RuntimeError as error:  # memory ran out, or somebody waited for the device
            logger.info("decode sweeps are launched operator by operator: %s", error)
            captured = None
        tiled = any(
            call.tiles for block in blocks for wave in block.waves for some in wave.calls.values() for call in some
        )
        if captured is None or tiled:  # how many tiles there are is up to the longest sequence
            self.forget(for_good=True)
            return None
        outputs, replay = captured
        num_used = context.sweep.blocks[0].num_used if context.has_counted else None
        routed = tuple(context.routed)
        return _Graph(num_used, routed, inputs, numbers.there, blocks, outputs, self._kv.written, replay)
