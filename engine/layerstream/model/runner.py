"""Runs a sweep: rows in, logits out, every streamed weight past the compute once.

transformers owns the forward: the decoder's own ``forward`` walks its layers, and the wrappers on its modules bring
weights and cut row blocks. The head is taken apart from it, because only sampled rows go through and its slices pass
once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Span, Sweep
from layerstream.hardware.device import Placement, is_out_of_memory
from layerstream.kv.drafted import DraftedRows
from layerstream.kv.on_device import DeviceKV
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.state import LayerState
from layerstream.model import grouped_experts
from layerstream.model.blending import Blender
from layerstream.model.cache import PagedCache
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.embedding import EmbeddingRows
from layerstream.model.ends import ModelEnds
from layerstream.model.graphs import Graphs, Inputs, Outputs
from layerstream.model.head import Head
from layerstream.model.linear import SlicedLinear
from layerstream.model.model_weights import ModelWeights
from layerstream.model.recurrence import Recurrence, mixing
from layerstream.model.skeleton import Skeleton
from layerstream.store.loader import PageLoader

LookUp: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SAMPLED = "sampled"
_NOTHING: Mapping[str, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class Loaders:
    """What brings stored pages, and stored states of recurrent layers."""

    pages: PageLoader
    states: PageLoader


class SweepRunner:
    """Computes sweeps, one at a time, on the thread that calls.

    Args:
        states: the KV of each layer that keeps some, in host memory.
        recurrent: the slots of each layer that keeps states.
        head_rows: rows per row block of the head.
        loaders: bring stored pages and states; ``None`` without a store.
        placement: the devices that compute; ``None``: the processor.
        device_kv: the KV on them.
        prefers_flash: attend there with the flash-attn package.
        head: the output projection, where it is not among *weights*.
        blender: moves what blended prompts have from elsewhere; ``None``: there are none.
        graphs: of decode sweeps; ``None``: they are launched operator by operator.
        chunk_tokens: prompt tokens that attend together where the processor computes; 0: spans attend as they are.

    Attributes:
        embedding: rows of the embedding.
        keeps_hidden: whether the hidden states of a sweep are kept for :meth:`take_hidden`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        weights: ModelWeights,
        embedding: EmbeddingRows,
        layer_embedding: EmbeddingRows | None,
        states: list[LayerState],
        recurrent: list[RecurrentLayer],
        head_rows: int,
        loaders: Loaders | None = None,
        placement: Placement | None = None,
        device_kv: DeviceKV | None = None,
        prefers_flash: bool = False,
        head: SlicedLinear | None = None,
        graphs: Graphs | None = None,
        blender: Blender | None = None,
        chunk_tokens: int = 0,
    ) -> None:
        self.embedding = embedding
        self.keeps_hidden = False
        self._hidden: torch.Tensor | None = None
        self._read: list[tuple[Span, torch.Tensor]] = []
        self._dtype = skeleton.dtype
        self._weights = weights
        self._layer_embedding = layer_embedding
        self._states = states
        self._recurrent = recurrent
        self._numbers = {layer: number for number, layer in enumerate(skeleton.trace.recurrent)}
        self._loaders = loaders
        self._placement = placement
        self._device_kv = device_kv
        self._prefers_flash = prefers_flash
        self._torch_device = torch.device("cpu") if placement is None else placement.first.torch_device
        self._drafted = DraftedRows({})
        self._recurrence: Recurrence | None = None
        self._layers = skeleton.trace.layers
        self._cache = PagedCache()
        self._decode = skeleton.decoder.forward
        self._cache_name = skeleton.anatomy.cache_name
        self._ends = ModelEnds(skeleton.anatomy, skeleton.dtype)
        self._graphs = graphs
        self._blender = blender
        self._chunk_tokens = chunk_tokens
        self._head = Head(head or weights.head, self._ends, head_rows)

    def run(self, sweep: Sweep, given: Mapping[str, torch.Tensor] = _NOTHING) -> torch.Tensor:
        """Logits ``(len(sweep.sampled_rows), vocabulary)`` of the sampled rows, valid until the next run; new KV rows
        are in the pages, those of guesses wait for :meth:`accept`.

        After an error the ring is empty and the sweep had no effect that a later one could see: rows in the pages past
        a sequence's ``num_computed`` are written again.

        Args:
            given: tensors in host memory that the decoder is given beside embeddings.

        Raises:
            PagesLost: a stored page is damaged or gone. ReadError, EngineClosed: weights could not be read.
        """
        streamer, device_kv = self._weights.streamer, self._device_kv
        loader = self._loaders.pages if self._loaders is not None and sweep.loads else None
        state_loader = self._loaders.states if self._loaders is not None and sweep.state_loads else None
        bringing = [part for part in (loader, state_loader) if part is not None]
        computing = [part for part in (streamer, device_kv) if part is not None]
        with self._computing():
            try:
                if loader is not None:
                    loader.begin(sweep.loads)
                if state_loader is not None:
                    state_loader.begin(sweep.state_loads)
                if device_kv is not None:
                    device_kv.begin(sweep, None if loader is None else loader.wait)
                with sweeping(self._context(sweep, loader)) as context, self._mixing(context, state_loader):
                    self._drafted = context.drafted
                    if streamer is not None:
                        streamer.begin(with_tail=bool(sweep.sampled))
                    hidden, logits = self._outputs(context, self._inputs(sweep, given))
                    self._hidden = hidden.cpu() if self.keeps_hidden else None
                    self._read = _sums(sweep, hidden)
                    grouped_experts.check(context.routed)
                    for part in (*computing, *bringing):
                        part.end()
                    return logits[: len(sweep.sampled_rows)].cpu()
            except BaseException as error:
                if self._graphs is not None:
                    self._graphs.forget(for_good=is_out_of_memory(error))
                for part in (*bringing, *computing):
                    part.abort()
                raise

    def take_hidden(self) -> torch.Tensor:
        """``(rows, hidden)`` in host memory: what came out of the final norm in the last sweep; once, where it is
        kept."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "nobody asked for them, or they were taken"
        return hidden

    def take_read(self) -> list[tuple[Span, torch.Tensor]]:
        """Of the last sweep, for each span whose hidden states are wanted, the sum ``(hidden,)`` over those rows, fp32
        in host memory; once."""
        read, self._read = self._read, []
        return read

    def accept(self, sequence: Sequence, nodes: Seq[int]) -> None:
        """The guesses *nodes* of the last sweep, a path, were right: their KV goes to the pages, and the states of
        *sequence* are those after them."""
        with self._computing():
            if self._device_kv is not None:
                self._device_kv.accept(sequence, nodes)
            else:
                self._drafted.accept(self._states, sequence, nodes, sequence.num_computed)
            if self._recurrence is not None:
                self._recurrence.accept(sequence, nodes)

    def copy_page(self, source: int, target: int) -> None:
        """Make page *target* a copy of *source*, in all layers."""
        with self._computing():
            for state in self._states:
                if state.shape is not None:
                    state.copy_page(source, target)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), nullcontext() if self._placement is None else self._placement.first.use():
            yield

    def _context(self, sweep: Sweep, loader: PageLoader | None) -> SweepContext:
        if self._device_kv is not None:
            kv = self._device_kv
            return SweepContext(sweep, self._layers, kv.layers, kv.reach, kv, self._prefers_flash)
        blend = self._blender.begin(sweep.moves, sweep.staying) if self._blender is not None and sweep.moves else None
        reach = None if loader is None else loader.wait
        return SweepContext(sweep, self._layers, self._states, reach, chunk_tokens=self._chunk_tokens, blend=blend)

    def _mixing(self, context: SweepContext, loader: PageLoader | None) -> AbstractContextManager[None]:
        if not self._recurrent:
            return nullcontext()
        wait = None if loader is None else loader.wait
        self._recurrence = Recurrence(context.sweep, self._recurrent, self._numbers, lambda: context.active, wait)
        return mixing(self._recurrence)

    def _outputs(self, context: SweepContext, inputs: Inputs) -> Outputs:
        """Of a sweep, by a graph where there is one."""
        compute = partial(self._compute, num_sampled=len(context.sweep.sampled_rows))
        numbers = None
        if self._graphs is not None and not self._weights.is_recorded:
            numbers = self._graphs.takes(context)
        if self._graphs is None or numbers is None:
            return compute(inputs)
        with self._weights.at_once():
            return self._graphs.run(context, numbers, inputs, compute)

    def _compute(self, inputs: Inputs, num_sampled: int) -> Outputs:
        given = {name: tensor for name, tensor in inputs.items() if name != SAMPLED}
        decoded = self._decode(**given, **{self._cache_name: self._cache, "use_cache": True})
        hidden = decoded.last_hidden_state[0]
        if not num_sampled:
            return hidden, hidden[:0]
        return hidden, self._head.project(hidden[inputs[SAMPLED].to(hidden.device)], num_sampled)

    def _inputs(self, sweep: Sweep, given: Mapping[str, torch.Tensor]) -> Inputs:
        """What the decoder is given, and :data:`SAMPLED`: which of its rows are, on a device up to whole row blocks."""
        token_ids: list[int] = []
        rows: list[int] = []
        positions = [0] * sweep.num_rows
        for row, span in sweep.spans():
            token_ids.extend(sweep.token_ids(span))
            rows.extend(range(row, row + len(span)))
            positions[row : row + len(span)] = range(span.start, span.stop)
        sampled = list(sweep.sampled_rows)
        if self._placement is not None:
            sampled += [0] * (self._head.padded(len(sampled)) - len(sampled))
        found = self.embedding.gather(token_ids)
        of_layers = None if self._layer_embedding is None else _known_rows(self._layer_embedding, token_ids)
        numbers = [rows, positions, sampled, found[1], *(() if of_layers is None else of_layers[1:])]
        there = self._crossed(numbers)
        inputs = {
            "inputs_embeds": self._packed(self._ends.embed, found[0], there[3], there[0], sweep.num_rows),
            "position_ids": there[1][None],
            SAMPLED: there[2],
            **{name: tensor.to(self._torch_device) for name, tensor in given.items()},
        }
        if of_layers is not None:
            look_up = self._ends.embed_layers
            inputs["per_layer_inputs"] = self._packed(look_up, of_layers[0], there[4], there[0], sweep.num_rows)
        return inputs

    def _crossed(self, numbers: Seq[list[int]]) -> Seq[torch.Tensor]:
        """Each of *numbers* where the first layer is computed; one copy takes them there."""
        together = torch.tensor([number for part in numbers for number in part], dtype=torch.long)
        return together.to(self._torch_device).split([len(part) for part in numbers])

    def _packed(
        self, look_up: LookUp, distinct: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """``(1, num_rows, …)``: at *rows* what *look_up* finds among *distinct* ones, zeros elsewhere."""
        embedded = look_up(distinct.to(self._torch_device), indices)
        packed = embedded.new_zeros((1, num_rows, *embedded.shape[1:]))
        packed[0].index_copy_(0, rows, embedded)
        return packed


def _sums(sweep: Sweep, hidden: torch.Tensor) -> list[tuple[Span, torch.Tensor]]:
    """For each span of *sweep* that is read, the sum over its rows of *hidden* ``(rows, hidden)``."""
    wanted = list(sweep.read_rows())
    if not wanted:
        return []
    sums = torch.stack([hidden[rows].float().sum(0) for _, rows in wanted]).cpu()
    return [(span, total) for (span, _), total in zip(wanted, sums, strict=True)]


def _known_rows(table: EmbeddingRows, token_ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """As :meth:`EmbeddingRows.gather`; tokens that *table* has no row of have its first."""
    return table.gather([token if token < table.num_rows else 0 for token in token_ids])
