"""Runs a sweep: rows in, logits out, every streamed weight past the compute once.

transformers owns the forward: the decoder's own ``forward`` walks its layers, and the wrappers on its modules bring
weights and cut row blocks. The head is taken apart from it, because only sampled rows go through and its slices pass
once for all of them: the causal model's ``forward`` is then called per row with decoder and head short-circuited, so
that what it does to logits (scaling, soft caps) is done by it, in one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import MoeModelOutputWithPast

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Sweep
from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Placement
from layerstream.kv.drafted import DraftedRows
from layerstream.kv.on_device import DeviceKV
from layerstream.kv.recurrent import RecurrentLayer
from layerstream.kv.state import LayerState
from layerstream.model.anatomy import Anatomy
from layerstream.model.cache import PagedCache
from layerstream.model.context import SweepContext, sweeping
from layerstream.model.embedding import EmbeddingRows
from layerstream.model.linear import SlicedLinear, padded_blocks
from layerstream.model.model_weights import ModelWeights
from layerstream.model.recurrence import Recurrence, mixing
from layerstream.model.skeleton import Skeleton
from layerstream.store.loader import PageLoader

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
    ) -> None:
        self.embedding = embedding
        self.keeps_hidden = False
        self._hidden: torch.Tensor | None = None
        self._dtype = skeleton.dtype
        self._weights = weights
        self._head = head or weights.head
        self._layer_embedding = layer_embedding
        self._states = states
        self._recurrent = recurrent
        self._numbers = {layer: number for number, layer in enumerate(skeleton.trace.recurrent)}
        self._head_rows = head_rows
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
        self._stubs = _Stubs(skeleton.anatomy)
        self._room = _LogitRoom()

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
                    hidden = self._decode(**self._inputs(sweep, given)).last_hidden_state
                    self._hidden = hidden[0].cpu() if self.keeps_hidden else None
                    logits = self._project(hidden[0, list(sweep.sampled_rows)]) if sweep.sampled else hidden[0, :0]
                    for part in (*computing, *bringing):
                        part.end()
                    return logits.cpu()
            except BaseException:
                for part in (*bringing, *computing):
                    part.abort()
                raise

    def take_hidden(self) -> torch.Tensor:
        """``(rows, hidden)`` in host memory: what came out of the final norm in the last sweep; once, where it is
        kept."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "nobody asked for them, or they were taken"
        return hidden

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
        return SweepContext(sweep, self._layers, self._states, None if loader is None else loader.wait)

    def _mixing(self, context: SweepContext, loader: PageLoader | None) -> AbstractContextManager[None]:
        if not self._recurrent:
            return nullcontext()
        wait = None if loader is None else loader.wait
        self._recurrence = Recurrence(context.sweep, self._recurrent, self._numbers, context.spans, wait)
        return mixing(self._recurrence)

    def _inputs(self, sweep: Sweep, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        token_ids: list[int] = []
        rows: list[int] = []
        positions = torch.zeros((1, sweep.num_rows), dtype=torch.long)
        for row, span in sweep.spans():
            token_ids.extend(sweep.token_ids(span))
            rows.extend(range(row, row + len(span)))
            positions[0, row : row + len(span)] = torch.arange(span.start, span.stop)
        inputs = {
            "inputs_embeds": self._embed(self.embedding, token_ids, rows, sweep.num_rows),
            "position_ids": positions.to(self._torch_device),
            self._cache_name: self._cache,
            "use_cache": True,
            **{name: tensor.to(self._torch_device) for name, tensor in given.items()},
        }
        if self._layer_embedding is not None:
            table = self._layer_embedding
            known = [token if token < table.num_rows else 0 for token in token_ids]
            inputs["per_layer_inputs"] = self._embed(table, known, rows, sweep.num_rows)
        return inputs

    def _embed(self, table: EmbeddingRows, token_ids: list[int], rows: list[int], num_rows: int) -> torch.Tensor:
        """``(1, num_rows, …)``: at *rows* what the model makes of *token_ids*, zeros elsewhere."""
        distinct, indices = table.gather(token_ids)
        look_up = self._stubs.embed if table is self.embedding else self._stubs.embed_layers
        embedded = look_up(distinct.to(self._torch_device), indices.to(self._torch_device))
        packed = embedded.new_zeros((1, num_rows, *embedded.shape[1:]))
        packed[0, rows] = embedded
        return packed

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``(n, vocabulary)`` of final hidden states ``(n, hidden)``."""
        blocks = padded_blocks(len(hidden), self._head_rows)
        padded = F.pad(self._stubs.lead(hidden), (0, 0, 0, blocks[-1].stop - len(hidden)))
        head = self._head
        if self._placement is None:
            raw = self._room.take(len(hidden), head.num_rows, hidden.dtype)
        else:
            raw = hidden.new_empty((len(hidden), head.num_rows))
        head.project(padded, blocks, raw)
        logits = raw
        for row in range(len(hidden)):
            finished = self._stubs.finish(hidden[row], raw[row])
            if finished.dtype != logits.dtype:  # some models finish in fp32
                logits = torch.empty_like(raw, dtype=finished.dtype)
            logits[row] = finished[0]
        return logits


class _LogitRoom:
    """Memory that the logits of one sweep after the other lie in: in the heap, what the next sweep cannot use would
    stay beside them. It grows to the most rows that were wanted."""

    def __init__(self) -> None:
        self._arena: Arena | None = None

    def take(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """``(num_rows, width)``, holding anything; it is the room of the last call again."""
        num_bytes = num_rows * width * dtype.itemsize
        if self._arena is None or self._arena.num_bytes < num_bytes:
            self._arena = None  # before there is another
            self._arena = Arena(num_bytes)
        return self._arena.tensor[:num_bytes].view(dtype).view(num_rows, width)


class _Output(MoeModelOutputWithPast):
    """What a model below the head gives; ``None`` for what only some models give beside hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return


class _Stubs:
    """Short-circuits for the parts of the causal model that the runner does itself."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._given = torch.empty(0)  # to the head
        for part in (anatomy.trunk, anatomy.decoder):  # some call the one, some the other
            part.forward = self._decoded
        anatomy.head.forward = self._projected  # type: ignore[method-assign,assignment]
        probe = torch.ones(anatomy.head.in_features)
        self._leads = not torch.equal(self._lead(probe), probe)

    def embed(self, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The embedding module's own forward over gathered *rows*: ``(n, hidden)``, scaled where the family does."""
        with _bound(self._anatomy.embedding, rows):
            return self._anatomy.embedding(indices)

    def embed_layers(self, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The decoder's own look-up in gathered *rows* of its second table: ``(n, layers, width)``."""
        assert self._anatomy.layer_embedding is not None
        with _bound(self._anatomy.layer_embedding, rows):
            return self._anatomy.decoder.get_per_layer_inputs(indices)

    def lead(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(n, hidden)``: what the causal model makes of final hidden states before its head: scales them, if that."""
        return torch.stack([self._lead(row) for row in hidden]) if self._leads else hidden

    def _lead(self, hidden: torch.Tensor) -> torch.Tensor:
        self.finish(hidden, hidden.new_zeros(()).expand(self._anatomy.head.out_features))
        return self._given

    def finish(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``(1, vocabulary)``: what the causal model makes of one row's raw *logits*."""
        self._hidden, self._logits = hidden[None, None], logits[None, None]
        try:
            return self._anatomy.causal(inputs_embeds=self._hidden, use_cache=False).logits[0]
        finally:
            self._hidden = self._logits = None

    def _decoded(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=self._hidden)

    def _projected(self, hidden: torch.Tensor) -> torch.Tensor | None:
        self._given = hidden.view(-1)
        return self._logits


@contextmanager
def _bound(embedding: torch.nn.Embedding, rows: torch.Tensor) -> Iterator[None]:
    """*embedding* has *rows* alone."""
    meta = embedding._parameters["weight"]
    embedding._parameters["weight"] = rows  # type: ignore[assignment]
    try:
        yield
    finally:
        embedding._parameters["weight"] = meta
