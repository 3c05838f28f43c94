"""KV on accelerators: pages have their place in host memory, and what is being computed with is on the device, too.

Where weights stream, a device holds the pages of the layers in hand, which take turns; where they do not, those of all
its layers stay. Host memory always has everything: the store, suspended sequences and accepted guesses know nothing of
devices.

A sweep, layer by layer (``inward``, ``compute`` and ``outward`` are lanes of the layer's device):

| when | what is queued |
|---|---|
| ``begin`` | pages of layer 0 that the sweep reads: inward |
| ``reach(i)`` | new rows of layer i - 1: outward; compute waits for layer i's pages; pages of layer i + 1: inward |
| ``write`` | a block's rows to where :mod:`layerstream.kv.device_rows` says: one scatter each of keys and values |
| ``end`` | new rows of the last layer: outward; the host waits for all of it, and puts rows into its pages |

Rows of prompts leave page by page. Those of decode blocks, guesses among them, leave side by side, as they were
computed (:mod:`layerstream.kv.staging`): what that takes does not depend on how many sequences there are.

Invariants:

* pages of layer i come in after compute and outward copies of the layer that had their place before;
* rows go out after the compute that made them, and the host reads none before ``end`` returned;
* what leaves as it was computed is let go of by the host when the compute lane is past its copy;
* a page on the device is used without being copied only if it was copied or computed there since the host's last
  change of it; what an accepted guess left in place there was computed there;
* layers are reached in order, one sweep at a time, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sight import Sight
from layerstream.core.sweep import RowBlock, Span, Sweep
from layerstream.hardware.device import Device, Mark, Placement
from layerstream.kv.device_layer import DeviceLayer
from layerstream.kv.device_rows import pool_row, rows_of
from layerstream.kv.pages import LAYERS_IN_HAND
from layerstream.kv.readings import BlockTensors, SweepNumbers, WaveTensors
from layerstream.kv.shape import PageShape
from layerstream.kv.staging import Staging
from layerstream.kv.state import LayerState, merged, runs, shape_of

MERGED_BYTES = 2**18  # a copy of so many costs the link what another call costs the thread that queues it

Written: TypeAlias = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
Wait: TypeAlias = Callable[[int], None]  # until the stored pages of this layer are on the host


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a layer's pages are: a place on a device, its own or shared with other layers (``rides``)."""

    device: Device
    place: tuple[int, int]
    rides: bool


@dataclass(slots=True)
class _Fresh:
    """Rows of a block as they were computed: ``(rows, heads, width)``, for the staged rows from ``first`` on."""

    first: int
    keys: torch.Tensor
    values: torch.Tensor


class DeviceKV:
    """The pages of *states* on the devices that compute them.

    Args:
        layers: those that cache; *states*: their KV in host memory, pinned; *shapes*: what they keep of a token.
        sights: of all layers that attend, what they let a row see.
        num_pages: how many pages there are.
        rides: for each device, keep the layers in hand only.
        lasting: positions in *layers* of those that later ones attend to as well; they do not take turns.
        staged_rows: that have room to leave side by side.
    """

    def __init__(
        self,
        placement: Placement,
        layers: Sequence[int],
        states: Sequence[LayerState],
        shapes: Sequence[PageShape],
        sights: Sequence[Sight],
        num_pages: int,
        page_tokens: int,
        rides: Sequence[bool],
        lasting: Collection[int] = (),
        staged_rows: int = 0,
    ) -> None:
        self._devices = placement.devices
        self._sights = tuple(sights)
        self._num_pages = num_pages
        self._page_tokens = page_tokens
        self._lasting = lasting
        self._homes: list[_Home] = []
        places = [placement.layers[layer] for layer in layers]
        for number, at in enumerate(places):
            before = places[:number].count(at)
            takes_turns = rides[at] and number not in lasting
            place = at, before % LAYERS_IN_HAND if takes_turns else LAYERS_IN_HAND + before
            self._homes.append(_Home(placement.devices[at], place, takes_turns))
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self.layers = [
            DeviceLayer(partial(self.place, layer), state, num_pages, page_tokens) for layer, state in enumerate(states)
        ]
        self._staging = Staging(staged_rows, shapes, placement.first)
        self._free: dict[tuple[int, int], Mark] = {}  # by place: nothing queued before touches it
        self._wait: Wait | None = None
        self._rows = rows_of(Sweep((), ()), page_tokens, num_pages)
        self._numbers: dict[int, int] = {}  # of blocks, by identity
        self._staged: dict[int, int] = {}  # blocks that leave side by side, and their first place there
        self._direct: list[tuple[int, int]] | None = []
        self._numbers_made: SweepNumbers | None = None
        self._tensors: dict[torch.device, tuple[BlockTensors, ...]] = {}
        self._pages: list[int] = []
        self._arrived: dict[int, Mark] = {}
        self._sent: dict[int, Mark] = {}
        self._fresh: dict[int, dict[int, _Fresh]] = {}  # by layer and block
        self._reached = -1
        self._is_at_once = False

    def begin(self, sweep: Sweep, wait: Wait | None) -> None:
        """Start a sweep; *wait* returns when the stored pages of a layer are on the host, if it has any.

        Raises:
            PagesLost: *wait* did.
        """
        self._wait = wait
        self._rows = rows_of(sweep, self._page_tokens, self._num_pages)
        self._numbers = {id(block): number for number, block in enumerate(sweep.blocks)}
        self._stage()
        self._pages = sorted(_past_pages([span for _, span in sweep.known_spans()], self._page_tokens))
        self._arrived.clear()
        self._reached = -1
        self._bring(0)

    def reach(self, layer: int) -> None:
        """The compute has come to *layer*.

        Raises:
            PagesLost: as in :meth:`begin`.
        """
        if layer <= self._reached:
            return
        if self._reached >= 0:
            self._send(self._reached)
            self._let_go(self._reached - 1)
        for skipped in range(self._reached + 1, layer + 1):  # layers that keep nothing of their own
            if skipped not in self._arrived:
                self._bring(skipped)
        self._reached = layer
        self._homes[layer].device.compute.after(self._arrived[layer])
        if layer + 1 < len(self.layers):
            self._bring(layer + 1)

    def plain_numbers(self) -> SweepNumbers | None:
        """The numbers of the sweep, of one block that leaves side by side, where all that is done with them follows
        from its shape, and all layers keep a place on one device; else ``None``."""
        if len(self._rows.blocks) != 1 or 0 not in self._staged or any(home.rides for home in self._homes):
            return None
        if len(self._devices) != 1 or any(layer.host.shape is None for layer in self.layers):
            return None
        return self._sweep_numbers if self._sweep_numbers.is_plain else None

    def reach_all(self, numbers: SweepNumbers, room: torch.Tensor | None) -> tuple[BlockTensors, ...]:
        """The compute comes to all layers at once, by *numbers*, which cross into *room*; what it makes leaves when it
        is over.

        Raises:
            PagesLost: as in :meth:`begin`.
        """
        (device,) = self._devices
        found = self._tensors[device.torch_device] = numbers.go(device.torch_device, room)
        for layer in range(len(self.layers)):
            if layer not in self._arrived:
                self._bring(layer)
            device.compute.after(self._arrived[layer])
        self._reached, self._is_at_once = len(self.layers) - 1, True
        return found

    @property
    def written(self) -> Written:
        """Keys and values that the one block has written so far, by layer."""
        return {layer: (fresh[0].keys, fresh[0].values) for layer, fresh in self._fresh.items()}

    def wrote(self, written: Written) -> None:
        """The one block has written *written*, without :meth:`write`."""
        for layer, (keys, values) in written.items():
            self.layers[layer].valid.update(self._rows.blocks[0].pages)
            self._fresh[layer] = {0: _Fresh(self._staged[0], keys, values)}

    def write(
        self, layer: int, active: Iterable[tuple[int, RowBlock]], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write ``(heads, rows, width)`` *keys* and *values* of the *active* blocks, each with its first row there."""
        there = self.layers[layer]
        there.reserve(shape_of(keys, values))
        for start, block in active:
            number = self._numbers[id(block)]
            own = slice(start, start + block.num_rows)
            rows = keys[:, own].transpose(0, 1), values[:, own].transpose(0, 1)
            there.scatter(self._block(layer, number).targets, *rows)
            there.valid.update(self._rows.blocks[number].pages)
            if number in self._staged:
                fresh = _Fresh(self._staged[number], *(part.contiguous() for part in rows))
                self._fresh.setdefault(layer, {})[number] = fresh

    def waves(self, layer: int, block: RowBlock) -> Iterable[WaveTensors]:
        """The waves in which *block* attends to *layer*, each with its guesses in place when it is given."""
        for wave in self._block(layer, self._numbers[id(block)]).waves:
            for move in wave.moves:
                fresh = self._fresh[layer][move.block]
                rows = (part.index_select(0, move.rows) for part in (fresh.keys, fresh.values))
                self.layers[layer].scatter(move.targets, *rows)
            yield wave

    def end(self) -> None:
        """The sweep is over, and all that it computed is on the host when this returns."""
        for layer in range(0 if self._is_at_once else self._reached, self._reached + 1):
            if layer >= 0:
                self._send(layer)
        self._settle()
        self._unstage()

    def accept(self, sequence: TokenSequence, nodes: Sequence[int]) -> None:
        """The guesses *nodes* of the last sweep, a path, were right: put them into the pages of *sequence*."""
        start, tokens = sequence.num_computed, self._page_tokens
        places = {
            span.node: self._staged[rows.number] + at
            for rows in self._rows.blocks
            for at, span in rows.block.spans_from(0)
            if span.sequence is sequence and span.is_drafted
        }
        staged = torch.tensor([places[node] for node in nodes])
        targets = torch.tensor([pool_row(sequence, start + at, tokens) for at in range(len(nodes))])
        is_there = self._rows.placed[sequence][: len(nodes)] == tuple(nodes)
        pages = sequence.pages[start // tokens : (start + len(nodes) - 1) // tokens + 1]
        self._put(staged, targets)
        if not is_there:
            for layer in self.layers:
                layer.valid.difference_update(pages)

    def abort(self) -> None:
        """The sweep died: what it wrote is past what anybody reads, and nothing is under way any more."""
        self._settle()
        for layer in self.layers:
            layer.valid.clear()

    def close(self) -> None:
        """Unpin what was pinned here; nothing is under way. Idempotent."""
        self._staging.close()

    def place(self, layer: int, num_bytes: int) -> torch.Tensor:
        """Memory for *num_bytes* of *layer*, shared with the layers that take turns with it."""
        home = self._homes[layer]
        memory = self._memory.get(home.place)
        if memory is None or len(memory) < num_bytes:
            if memory is not None:
                self._settle()
            self._memory.pop(home.place, None)
            memory = self._memory[home.place] = home.device.allocate(num_bytes)
            home.device.inward.after(home.device.compute.mark())  # what was computed there before it was freed
        return memory

    def _block(self, layer: int, number: int) -> BlockTensors:
        device = self._homes[layer].device.torch_device
        if device not in self._tensors:
            self._tensors[device] = self._sweep_numbers.go(device)
        return self._tensors[device][number]

    @property
    def _sweep_numbers(self) -> SweepNumbers:
        """Those of the sweep, made when they are first asked for."""
        if self._numbers_made is None:
            self._numbers_made = SweepNumbers(self._rows, self._sights)
        return self._numbers_made

    def _stage(self) -> None:
        """Give places to blocks whose rows leave side by side: those with guesses, and others as long as there are."""
        self._numbers_made = None
        self._tensors.clear()
        self._staged.clear()
        self._direct = None
        staged = [rows for rows in self._rows.blocks if rows.is_staged]
        used = 0
        for rows in sorted(staged, key=lambda rows: not rows.has_guesses):
            size = rows.block.num_rows
            if rows.has_guesses or used + size <= self._staging.num_rows:
                self._staged[rows.number] = used
                used += size
        self._staging.reserve(used)

    def _unstage(self) -> None:
        """Put the known rows that arrived side by side into the host's pages."""
        places = [
            (self._staged[rows.number] + at, target)
            for rows in self._rows.blocks
            if rows.number in self._staged
            for at, target in rows.known()
        ]
        if not places:
            return
        self._put(*torch.tensor(places).unbind(1))

    def _put(self, staged: torch.Tensor, targets: torch.Tensor) -> None:
        """Put the *staged* rows of all layers into rows *targets* of the host's pages."""
        for layer, there in enumerate(self.layers):
            if there.host.shape is not None:
                there.host.scatter(targets, *(part.index_select(0, staged) for part in self._staging.rows(layer)))

    def _settle(self) -> None:
        for device in self._devices:
            for lane in (device.inward, device.compute, device.outward):
                lane.mark().wait()
        self._reached = -1
        self._is_at_once = False
        self._wait = None
        self._fresh.clear()
        self._sent.clear()

    def _let_go(self, layer: int) -> None:
        """Of what *layer* made, when it has left."""
        sent = self._sent.pop(layer, None)
        if sent is None or layer in self._lasting:
            return
        self._homes[layer].device.compute.after(sent)
        self._fresh.pop(layer, None)

    def _bring(self, layer: int) -> None:
        """Queue the pages of *layer* that the sweep reads and the device does not have."""
        if self._wait is not None:
            self._wait(layer)
        target, home = self.layers[layer], self._homes[layer]
        inward = home.device.inward
        if home.place in self._free:
            inward.after(self._free[home.place])
        if home.rides:
            target.valid.clear()
        state = target.host
        if state.shape is not None:
            target.reserve(state.shape)
            missing = [page for page in self._pages if page not in target.valid]
            for first, count in merged(runs(missing, -1), MERGED_BYTES // state.page_bytes):
                for there, here in zip(target.rows(first, count), state.rows(first, count), strict=True):
                    inward.copy(there, here)
            target.valid.update(missing)
        self._arrived[layer] = inward.mark()

    def _send(self, layer: int) -> None:
        """Queue the rows of *layer* that the sweep made."""
        source, home = self.layers[layer], self._homes[layer]
        state, outward = source.host, home.device.outward
        outward.after(home.device.compute.mark())
        for fresh in self._fresh.get(layer, {}).values():
            rows = slice(fresh.first, fresh.first + len(fresh.keys))
            for here, there in zip(self._staging.rows(layer), (fresh.keys, fresh.values), strict=True):
                outward.copy(here[rows], there)
        if state.shape is not None:
            for first, count in self._direct_runs():
                there, here = source.row_range(first, count), state.row_range(first, count)
                for new, kept in zip(there, here, strict=True):
                    outward.copy(kept, new)
        self._free[home.place] = self._sent[layer] = outward.mark()

    def _direct_runs(self) -> list[tuple[int, int]]:
        """Rows of blocks that leave page by page, as they lie in a pool: first and count, neighbours joined."""
        if self._direct is None:
            targets = sorted(
                target for rows in self._rows.blocks if rows.number not in self._staged for _, target in rows.known()
            )
            self._direct = list(runs(targets, -1))
        return self._direct


def _past_pages(spans: Iterable[Span], page_tokens: int) -> set[int]:
    """Pages with tokens before the first of their sequence in *spans*."""
    first: dict[int, Span] = {}
    for span in spans:
        known = first.get(id(span.sequence))
        if known is None or span.start < known.start:
            first[id(span.sequence)] = span
    return {page for span in first.values() for page in span.sequence.pages[: -(-span.start // page_tokens)]}
